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
	showVersion := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *showVersion {
		fmt.Println(envd.Version)
		return
	}
	if err := run(*listen, *asInit); err != nil {
		fmt.Fprintln(os.Stderr, "envd:", err)
		os.Exit(1)
	}
}

func run(address string, asInit bool) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	l, err := envd.Listen(address)
	if err != nil {
		return err
	}
	return envd.New(envd.Config{Init: asInit, OwnsMachine: envd.IsInit()}).Serve(ctx, l)
}
