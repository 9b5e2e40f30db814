package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	envd "github.com/wrenn/wrenn/internal/envd/version"
)

// version is set when a release is built (-ldflags "-X main.version=…").
var version = ""

// versions says what this binary is made of.
type versions struct {
	Version string `json:"version"`
	Envd    string `json:"envd"`   // of the guest agent it carries
	GVisor  string `json:"gvisor"` // module version of the runtime it carries
	Go      string `json:"go"`
}

func newVersionCmd() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print what this binary is made of",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := readVersions()
			if asJSON {
				return printJSON(cmd.OutOrStdout(), v)
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "wrenn %s\nenvd %s\ngvisor %s\ngo %s\n", v.Version, v.Envd, v.GVisor, v.Go)
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object")
	return cmd
}

func readVersions() versions {
	v := versions{Version: version, Envd: envd.Version, GVisor: "unknown", Go: runtime.Version()}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	for _, module := range info.Deps {
		if module.Path == "gvisor.dev/gvisor" {
			v.GVisor = module.Version
		}
	}
	if v.Version == "" {
		v.Version = "devel"
		for _, setting := range info.Settings {
			if setting.Key == "vcs.revision" && len(setting.Value) >= 12 {
				v.Version = "devel-" + setting.Value[:12]
			}
		}
	}
	return v
}
