package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/sandbox"
)

const (
	// runLease is the time to live of a sandbox whose command has no time limit.
	// It is renewed while the program is there, so this is how long a sandbox
	// outlives a program that was killed.
	runLease = 5 * time.Minute
	// runGrace is how much longer than its command's time limit a sandbox lives
	// when this program is not there to end it.
	runGrace = 5 * time.Second
	// killTimeout bounds ending the sandbox.
	killTimeout = 30 * time.Second
)

// runOptions are what `wrenn run` can be told about the sandbox; the command's own
// options are commandOptions.
type runOptions struct {
	template   string
	timeout    time.Duration // 0: none
	noInternet bool
}

func newRunCmd() *cobra.Command {
	var opts runOptions
	var command commandOptions
	cmd := &cobra.Command{
		Use:   "run [flags] -- COMMAND [ARG…]",
		Short: "Run a command in a sandbox of its own",
		Long: `Run a command in a new sandbox, which is gone afterwards.

The command is executed as given, without a shell. Its output comes as it is
written, standard input goes to it, and its exit code comes back (128+n when
signal n ended it). 124 stands for a command that ran into --timeout, 125 for a
failure of the platform, 126 and 127 for a command that cannot be executed or
does not exist. Ctrl-C and SIGTERM are passed on as SIGTERM; the second one ends
the sandbox.`,
		Example: `  wrenn run -- python3 -c 'print(6*7)'
  echo hello | wrenn run -- tr a-z A-Z
  wrenn run -it -- bash`,
		Args: commandArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if opts.timeout < 0 {
				return usageErrorf("--timeout must not be negative")
			}
			attached, err := command.attachment(args)
			if err != nil {
				return err
			}
			c, err := connect(cmd)
			if err != nil {
				return &exitError{exitPlatform, err}
			}
			return runInNewSandbox(cmd.Context(), c, opts, attached)
		},
	}
	cmd.Flags().SetInterspersed(false)
	cmd.Flags().StringVar(&opts.template, "template", "base", "template or snapshot that the sandbox starts from")
	cmd.Flags().DurationVar(&opts.timeout, "timeout", 0, "end the command after this time (default: no limit)")
	cmd.Flags().BoolVar(&opts.noInternet, "no-internet", false, "give the sandbox no access to the internet")
	command.register(cmd)
	return cmd
}

// commandArgs checks that there is a command.
func commandArgs(_ *cobra.Command, args []string) error {
	if len(args) == 0 || args[0] == "" {
		return usageErrorf("no command given: add -- COMMAND [ARG…]")
	}
	return nil
}

// commandOptions are what all commands that run something in a sandbox can be told.
type commandOptions struct {
	env         []string
	user, dir   string
	interactive bool
	tty         bool
}

func (o *commandOptions) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringArrayVarP(&o.env, "env", "e", nil, "environment variable NAME=VALUE, or NAME to take the value from here; may be repeated")
	f.StringVarP(&o.user, "user", "u", "", "user to run as (default: the template's)")
	f.StringVarP(&o.dir, "workdir", "w", "", "working directory (default: the template's)")
	f.BoolVarP(&o.interactive, "interactive", "i", false, "pass standard input on also when it is a terminal")
	f.BoolVarP(&o.tty, "tty", "t", false, "give the command a terminal")
}

func (o *commandOptions) attachment(args []string) (*attachment, error) {
	env, err := parseEnv(o.env)
	if err != nil {
		return nil, err
	}
	return &attachment{
		command:     client.Command{Path: args[0], Args: args[1:], Env: env, User: o.user, Dir: o.dir},
		interactive: o.interactive,
		tty:         o.tty,
	}, nil
}

// parseEnv reads NAME=VALUE, and NAME for a variable of this program's own; one
// that is not set here is left out.
func parseEnv(list []string) (map[string]string, error) {
	env := make(map[string]string)
	for _, item := range list {
		name, value, given := strings.Cut(item, "=")
		if name == "" {
			return nil, usageErrorf("-e %q has no name: want NAME=VALUE or NAME", item)
		}
		if !given {
			if value, given = os.LookupEnv(name); !given {
				continue
			}
		}
		env[name] = value
	}
	return env, nil
}

// runInNewSandbox creates a sandbox, runs the command in it and ends it, whatever
// happens in between.
func runInNewSandbox(ctx context.Context, c *client.Client, opts runOptions, a *attachment) error {
	signals, stop := watchSignals()
	defer stop()
	a.signals = signals

	request := client.CreateRequest{TemplateID: opts.template, Timeout: runLease}
	if opts.timeout > 0 {
		request.Timeout = opts.timeout + runGrace
	}
	if opts.noInternet {
		request.AllowInternetAccess = new(bool)
	}
	info, err := createUninterrupted(ctx, c, request, signals)
	if err != nil {
		return exitStatus(client.Exit{}, err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if opts.timeout > 0 {
		message := fmt.Errorf("the command was ended: it ran into its time limit of %s", opts.timeout)
		timer := time.AfterFunc(opts.timeout, func() { cancel(&exitError{exitTimedOut, message}) })
		defer timer.Stop()
	} else {
		go keepAlive(ctx, runLease, func(ctx context.Context) error {
			return c.SetTimeout(ctx, info.SandboxID, runLease)
		})
	}
	exit, err := a.run(ctx, c.Sandbox(info))
	if err != nil {
		err = explainLoss(ctx, c, info.SandboxID, err)
	}
	killSandbox(c, info.SandboxID, request.Timeout)
	return exitStatus(exit, err)
}

// createUninterrupted creates a sandbox. A signal does not break the request off,
// which could leave a sandbox that nobody knows: it is awaited and its sandbox
// ended. The second signal is taken at its word.
func createUninterrupted(ctx context.Context, c *client.Client, r client.CreateRequest, signals <-chan os.Signal) (client.Info, error) {
	type answer struct {
		info client.Info
		err  error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan answer, 1)
	go func() {
		info, err := c.Create(ctx, r)
		answers <- answer{info, err}
	}()
	var interrupt error
	for {
		select {
		case got := <-answers:
			if got.err == nil && interrupt != nil {
				killSandbox(c, got.info.SandboxID, r.Timeout)
				return client.Info{}, interrupt
			}
			return got.info, got.err
		case s := <-signals:
			if interrupt != nil {
				fmt.Fprintf(os.Stderr, "wrenn: a sandbox may have been created; it ends by itself within %s\n", r.Timeout)
				return client.Info{}, interrupt
			}
			interrupt = interrupted{s.(syscall.Signal)}
		}
	}
}

// keepAlive renews a lease every half of it until ctx ends or the sandbox is gone.
// A renewal that fails is tried again soon: the platform may be restarting.
func keepAlive(ctx context.Context, lease time.Duration, renew func(context.Context) error) {
	timer := time.NewTimer(lease / 2)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		err := renew(ctx)
		switch {
		case errors.Is(err, sandbox.ErrNotFound):
			return
		case err != nil:
			timer.Reset(lease / 30)
		default:
			timer.Reset(lease / 2)
		}
	}
}

// explainLoss returns err, the end of an attachment, in better words when it came
// about because the sandbox has ended or is paused. The latter is an errPaused.
func explainLoss(ctx context.Context, c *client.Client, id string, err error) error {
	var exit *exitError
	var output *client.OutputError
	if ctx.Err() != nil || errors.As(err, &exit) || errors.As(err, &output) || errors.As(err, new(interrupted)) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, signalTimeout)
	defer cancel()
	info, getErr := c.Get(ctx, id)
	switch {
	case getErr == nil && info.State == "paused":
		return fmt.Errorf("the command's output has ended: %w", errPaused(id))
	case errors.Is(getErr, sandbox.ErrNotFound):
		var answer *client.APIError
		errors.As(getErr, &answer)
		return &exitError{128 + int(syscall.SIGKILL), fmt.Errorf("the sandbox ended while the command ran: %s", answer.Message)}
	}
	return err
}

// killSandbox ends a sandbox that this program made. A failure does not change
// the outcome of the command, but the user is told.
func killSandbox(c *client.Client, id string, lease time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	err := c.Kill(ctx, id)
	if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		fmt.Fprintf(os.Stderr, "wrenn: sandbox %s could not be ended, it ends by itself within %s: %v\n", id, lease, err)
	}
}
