package main

import (
	"cmp"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/client"
)

func newEnvCmd() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "env",
		Short: "Print the variables that point an E2B client at the platform",
		Long: `Print the variables that point an E2B client at the platform of the data
directory, for a POSIX shell:

  eval "$(wrenn env)"

Variables that are set already play no part.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// Only the file counts: variables from an eval long ago must not come back.
			creds, err := client.LoadCredentials(filepath.Join(dataFlag(cmd), client.CredentialsFile))
			if err != nil {
				return err
			}
			variables := platformVariables(creds)
			if asJSON {
				object := make(map[string]string)
				for _, v := range variables {
					object[v.name] = v.value
				}
				return printJSON(cmd.OutOrStdout(), object)
			}
			for _, v := range variables {
				if _, err := fmt.Fprintf(cmd.OutOrStdout(), "export %s=%s\n", v.name, shellQuote(v.value)); err != nil {
					return err
				}
			}
			return hintAtAuthority(cmd.OutOrStdout(), creds)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object")
	return cmd
}

type variable struct{ name, value string }

func platformVariables(c client.Credentials) []variable {
	variables := []variable{
		{"E2B_API_URL", c.APIURL},
		{"E2B_SANDBOX_URL", cmp.Or(c.SandboxURL, c.APIURL)},
		{"E2B_API_KEY", c.APIKey},
	}
	if c.Domain != "" {
		variables = append(variables, variable{"E2B_DOMAIN", c.Domain})
	}
	if c.CAFile != "" {
		variables = append(variables, variable{"NODE_EXTRA_CA_CERTS", c.CAFile})
	}
	return variables
}

// hintAtAuthority tells, in comments, what is not for everybody: SSL_CERT_FILE is
// in place of all other authorities, so that the shell's other programs would
// trust nothing else any more.
func hintAtAuthority(w io.Writer, c client.Credentials) error {
	if c.CAFile == "" {
		return nil
	}
	_, err := fmt.Fprintf(w, "# Python does not read NODE_EXTRA_CA_CERTS. For https://…%s: SSL_CERT_FILE=%s\n", c.Domain, shellQuote(c.CAFile))
	return err
}

// shellQuote makes one word of s for a POSIX shell, whatever is in it.
func shellQuote(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
