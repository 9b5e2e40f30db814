package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/client"
)

func newSandboxCreateCmd() *cobra.Command {
	var template string
	var timeout time.Duration
	var metadata, env []string
	var noInternet, protected, asJSON bool
	var maskHost, onTimeout string
	var autoResume bool
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Create a sandbox and print its id",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if timeout <= 0 {
				return usageErrorf("--timeout must be more than nothing")
			}
			request := client.CreateRequest{
				TemplateID: template, Timeout: timeout, Protected: protected, MaskRequestHost: maskHost, AutoResume: autoResume,
			}
			switch onTimeout {
			case "kill":
			case "pause":
				request.AutoPause = true
			case "pause-files":
				request.AutoPause, request.FilesOnly = true, true
			default:
				return usageErrorf("--on-timeout %q: want kill, pause or pause-files", onTimeout)
			}
			if autoResume && request.FilesOnly {
				return usageErrorf("--auto-resume needs memory to be kept: not with --on-timeout pause-files")
			}
			var err error
			if request.Metadata, err = parsePairs("--metadata", metadata); err != nil {
				return err
			}
			if request.EnvVars, err = parseEnv(env); err != nil {
				return err
			}
			if noInternet {
				request.AllowInternetAccess = new(bool)
			}
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			info, err := c.Create(cmd.Context(), request)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), info)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), info.SandboxID)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&template, "template", "base", "template or snapshot to start from")
	f.DurationVar(&timeout, "timeout", 5*time.Minute, "time to live")
	f.StringArrayVar(&metadata, "metadata", nil, "label KEY=VALUE; may be repeated")
	f.StringArrayVarP(&env, "env", "e", nil, "environment variable of all its processes NAME=VALUE, or NAME to take the value from here; may be repeated")
	f.BoolVar(&noInternet, "no-internet", false, "give the sandbox no access to the internet")
	f.BoolVar(&protected, "protected", false, "let nobody reach its ports without the traffic token or a preview link")
	f.StringVar(&maskHost, "mask-host", "", "Host header that its applications get, HOST[:PORT]; ${PORT} stands for the port's number")
	f.StringVar(&onTimeout, "on-timeout", "kill", "what happens at the end of its time: kill, pause, or pause-files to keep its files only")
	f.BoolVar(&autoResume, "auto-resume", false, "wake it, when it is paused, by requests to its ports")
	f.BoolVar(&asJSON, "json", false, "print a JSON object, access tokens included")
	return cmd
}
