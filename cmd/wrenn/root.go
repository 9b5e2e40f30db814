package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Exit codes that are not a command's own.
const (
	exitFailed        = 1
	exitUsage         = 2
	exitTimedOut      = 124 // as timeout(1)
	exitPlatform      = 125 // the platform failed, not the command that was to run
	exitNotExecutable = 126
	exitNotFound      = 127
)

// exitError ends the program with a certain code. Without err nothing is said:
// everything has been, by a command that ran in a sandbox.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usageErrorf returns an error for a command line that makes no sense.
func usageErrorf(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

// execute runs the command line and returns the program's exit code.
func execute() int {
	return executeRoot(newRootCmd(), os.Args[1:])
}

func executeRoot(root *cobra.Command, args []string) int {
	began := false // whether the command line made sense and the command was run
	root.PersistentPreRun = func(*cobra.Command, []string) { began = true }
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(context.Background())
	if err == nil {
		return 0
	}
	code := exitFailed
	var exit *exitError
	switch {
	case errors.As(err, &exit):
		code = exit.code
		if err = exit.err; err == nil {
			return code
		}
	case !began:
		code = exitUsage
	}
	message := explain(err, dataFlag(cmd))
	if code == exitUsage {
		message = usageMessage(cmd, err)
	}
	fmt.Fprintln(root.ErrOrStderr(), "wrenn: "+message)
	return code
}

func newRootCmd() *cobra.Command {
	root := &cobra.Command{
		Use:   "wrenn",
		Short: "Run code that nobody trusts in sandboxes that start in milliseconds",
		Long: `Wrenn runs code that nobody trusts in sandboxes that start in milliseconds.

  wrenn up                              start the platform on this machine
  wrenn run -- python3 -c 'print(6*7)'  run a command in a sandbox of its own
  eval "$(wrenn env)"                   point an E2B client at the platform`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE:          runGroup,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.PersistentFlags().String("data", dataDirDefault(), "data directory of the platform to use ($WRENN_DATA)")
	root.AddCommand(
		newUpCmd(),
		newDownCmd(),
		newServerCmd(),
		newAgentCmd(),
		newPagerCmd(),
		newRunCmd(),
		newSandboxCmd(),
		newSnapshotCmd(),
		newDoctorCmd(),
		newKernelCmd(),
		newEnvCmd(),
		newCACmd(),
		newBenchCmd(),
		newVersionCmd(),
	)
	return root
}

// runGroup is what a command that only has subcommands does by itself: help, or
// a complaint about the subcommand that it does not have.
func runGroup(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	if cmd.SuggestionsMinimumDistance <= 0 {
		cmd.SuggestionsMinimumDistance = 2
	}
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		return usageErrorf("unknown command %q: did you mean %q?", args[0], near[0])
	}
	return usageErrorf("unknown command %q", args[0])
}

// usageMessage puts a complaint and where to read on into one line.
func usageMessage(cmd *cobra.Command, err error) string {
	complaint, _, _ := strings.Cut(err.Error(), "\n")
	return fmt.Sprintf("%s (see: %s --help)", complaint, cmd.CommandPath())
}

// dataDirDefault is the data directory when the command line names none.
func dataDirDefault() string {
	if dir := os.Getenv("WRENN_DATA"); dir != "" {
		return dir
	}
	return defaultDataDir
}

// dataFlag returns the data directory that the command line names.
func dataFlag(cmd *cobra.Command) string {
	if dir, err := cmd.Flags().GetString("data"); err == nil && dir != "" {
		return dir
	}
	return dataDirDefault()
}

// connect returns a client of the platform that the command line or the
// environment names.
func connect(cmd *cobra.Command) (*client.Client, error) {
	return client.FromEnvironment(dataFlag(cmd))
}

// explain turns an error into what the user reads: what is wrong and what to do.
func explain(err error, dataDir string) string {
	var transport *url.Error
	if errors.As(err, &transport) && !errors.Is(err, context.Canceled) {
		return explainTransport(transport, dataDir)
	}
	var answer *client.APIError
	if errors.As(err, &answer) && errors.Is(err, sandbox.ErrUnauthenticated) {
		source := filepath.Join(dataDir, client.CredentialsFile)
		if os.Getenv("E2B_API_KEY") != "" {
			source = "E2B_API_KEY"
		}
		return fmt.Sprintf("the platform refuses the API key of %s: %s. `wrenn env` prints the local platform's", source, answer.Message)
	}
	return err.Error()
}

func explainTransport(err *url.Error, dataDir string) string {
	platform := err.URL
	if u, parseErr := url.Parse(err.URL); parseErr == nil {
		platform = u.Scheme + "://" + u.Host
	}
	if os.Getenv("E2B_API_URL") != "" || os.Getenv("E2B_DOMAIN") != "" {
		return fmt.Sprintf("cannot reach the platform at %s, which the environment names (E2B_API_URL, E2B_DOMAIN): %v", platform, err.Err)
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Sprintf("the platform at %s does not answer: start it with `make up`; its log is %s",
			platform, filepath.Join(dataDir, "log", "wrenn.log"))
	}
	return fmt.Sprintf("cannot reach the platform at %s: %v; its log is %s",
		platform, err.Err, filepath.Join(dataDir, "log", "wrenn.log"))
}

// printJSON writes v for scripts.
func printJSON(w io.Writer, v any) error {
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	return encoder.Encode(v)
}
