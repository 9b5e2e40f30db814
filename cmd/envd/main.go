// Command envd is the guest agent that runs inside every sandbox.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/envd"
	"github.com/wrenn/wrenn/internal/envd/machine"
	"github.com/wrenn/wrenn/internal/envd/mmds"
	"github.com/wrenn/wrenn/internal/envd/reserve"
	"github.com/wrenn/wrenn/internal/envd/rights"
	"github.com/wrenn/wrenn/internal/envd/settings"
)

func main() {
	listen := flag.String("listen", "0.0.0.0:49983", "`address` to answer on")
	asInit := flag.Bool("init", envd.IsInit(), "reap orphans, as pid 1 must")
	asVM := flag.Bool("vm", false, "be the first process of a virtual machine: mount, set up the network, power off on request")
	metadata := flag.Bool("mmds", false, "ask the virtual machine's monitor for the sandbox's identity, and for the hash of the access token that it may be initialized with (wrenn.mmds=1 on the kernel's command line asks for the identity alone)")
	forward := flag.Bool("forward", envd.IsInit(), "make what listens on the loopback reachable from outside")
	cgroups := flag.String("cgroups", "", "`directory` of a cgroup hierarchy of version 2 to give processes cgroups in (as pid 1: where it is mounted)")
	prefer := flag.Bool("prefer", envd.IsInit(), "go before the processes for the processor, and after them when memory runs out")
	showVersion := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *showVersion {
		fmt.Println(envd.Version)
		return
	}
	var err error
	switch {
	case *asVM && !envd.IsInit():
		err = fmt.Errorf("-vm is for pid 1 of a machine")
	case *asVM:
		err = runMachine(*listen, *metadata, *forward)
	default:
		err = run(*listen, *metadata, envd.Config{Init: *asInit, Forward: *forward, Cgroups: *cgroups, Prefer: *prefer})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "envd:", err)
		os.Exit(1)
	}
}

func run(address string, metadata bool, config envd.Config) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	if envd.IsInit() { // of a container, which only its runtime ends
		stop()
		ctx = context.Background()
		reserve.IgnoreSignals()
		reserve.Take()
		// With these it changes packet rules and the hostname.
		if err := rights.Withhold(unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN); err != nil {
			return err
		}
		if c := machine.NewContainer(settings.IDFile); c != nil {
			config.Name = c.Name
		}
	}
	defer stop()
	l, err := envd.Listen(address)
	if err != nil {
		return err
	}
	config.OwnsMachine = envd.IsInit()
	if metadata {
		config.Metadata, config.HashedToken = mmds.New(mmds.Address), true
	}
	return envd.New(config).Serve(ctx, l)
}

// runMachine serves until the machine's end is asked for, and then ends it. Also
// when serving fails: a kernel whose first process exits panics. It returns only
// when the kernel refuses to end the machine.
func runMachine(address string, metadata, forward bool) error {
	m := machine.Boot()
	reserve.Take()
	config := envd.Config{Init: true, OwnsMachine: true, Machine: m, Name: m.Name, Forward: forward}
	if metadata || m.Params().MMDS {
		config.Metadata, config.HashedToken = mmds.New(mmds.Address), metadata
	}
	l, err := envd.Listen(address)
	if err == nil {
		err = envd.New(config).Serve(m.Stopped(), l)
	}
	if err != nil {
		m.Log().Error("the guest agent ends, and the machine with it", "error", err)
	}
	return m.PowerOff()
}
