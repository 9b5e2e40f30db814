package kernel

// Args is the part of the command line that is the same in every machine,
// whichever monitor runs it: a boot without a word and without a wait.
func Args() []string {
	return []string{
		"quiet", "loglevel=1",
		"console=ttyS0",
		"reboot=k", "panic=-1", // a machine that cannot go on ends, and its monitor with it
		"net.ifnames=0",
		"tsc=reliable", "no_timer_check",
		"rcupdate.rcu_expedited=1",
		"random.trust_cpu=on",
		"8250.nr_uarts=1",
		"i8042.noaux", "i8042.nomux", "i8042.nopnp", "i8042.dumbkbd",
		"cryptomgr.notests",
	}
}
