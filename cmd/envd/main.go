// Command envd is the guest agent that runs inside every sandbox.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/wrenn/wrenn/internal/envd"
)

func main() {
	listen := flag.String("listen", "0.0.0.0:49983", "`address` to answer on")
	asInit := flag.Bool("init", envd.IsInit(), "reap orphans, as pid 1 must")
	forward := flag.Bool("forward", envd.IsInit(), "make what listens on the loopback reachable from outside")
	showVersion := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *showVersion {
		fmt.Println(envd.Version)
		return
	}
	if err := run(*listen, *asInit, *forward); err != nil {
		fmt.Fprintln(os.Stderr, "envd:", err)
		os.Exit(1)
	}
}

func run(address string, asInit, forward bool) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	l, err := envd.Listen(address)
	if err != nil {
		return err
	}
	return envd.New(envd.Config{Init: asInit, OwnsMachine: envd.IsInit(), Forward: forward}).Serve(ctx, l)
}
