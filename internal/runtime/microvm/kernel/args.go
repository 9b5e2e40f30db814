package kernel

// Args is the part of the command line that is the same in every machine,
// whichever monitor runs it: a boot without a word and without a wait. What protects
// the guest's kernel from its programs stays as the kernel has it.
func Args() []string {
	return []string{
		// The console costs a trap for each letter. What guestboot says is seen.
		"quiet", "loglevel=1", "console=ttyS0",
		// A machine that cannot go on ends, and its monitor with it.
		"reboot=k", "panic=-1",
		"net.ifnames=0", // the interface is eth0
		// Clocks are the monitor's, so there is nothing to calibrate or to distrust.
		"tsc=reliable", "no_timer_check",
		"rcupdate.rcu_expedited=1", // else every wait for other CPUs takes ticks
		"random.trust_cpu=on",
		// What is not there is not looked for.
		"8250.nr_uarts=1", "i8042.noaux", "i8042.nomux", "i8042.nopnp", "i8042.dumbkbd",
		"cryptomgr.notests",
		"no5lvl", // no machine has that much memory, and every miss of the TLB pays
		// Those that have no policy in a machine only take time.
		"lsm=landlock,yama",
	}
}
