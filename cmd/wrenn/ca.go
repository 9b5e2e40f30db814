package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/server/tlscert"
)

// caOptions are what `wrenn ca` can be told.
type caOptions struct {
	domains            []string
	renew              bool
	print              bool
	install, uninstall bool
}

func newCACmd() *cobra.Command {
	var o caOptions
	cmd := &cobra.Command{
		Use:   "ca",
		Short: "Make this machine's certificate authority, and have it trusted",
		Long: `Make this machine's certificate authority, where there is none yet, and say how
clients come to trust it. "wrenn up --domain D --tls-listen ADDRESS" without a
certificate pair and without ACME serves certificates that it signs.

It is good for names at and below localhost and the domains given when it is made,
and for no others: who trusts it does not trust it for the rest of the internet.`,
		Example: `  wrenn ca                                   make it, show where it is
  wrenn ca --domain sandboxes.example.com    make it for this domain
  wrenn ca --install                         have this machine's programs trust it
  wrenn ca --print > wrenn-ca.pem            for another machine`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return err
			}
			return o.run(cmd.Context(), dataFlag(cmd), cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&o.domains, "domain", nil, "domain of a platform that it may sign for; may be given several times")
	f.BoolVar(&o.renew, "new", false, "make another one in place of the one that there is; clients have to trust that one then")
	f.BoolVar(&o.print, "print", false, "print the certificate (PEM) and nothing else")
	f.BoolVar(&o.install, "install", false, "add it to the system's store (Debian, Fedora and their kin; needs root)")
	f.BoolVar(&o.uninstall, "uninstall", false, "take it out of the system's store")
	return cmd
}

func (o *caOptions) check() error {
	if o.uninstall && (o.install || o.print || o.renew || len(o.domains) > 0) {
		return usageErrorf("--uninstall goes with no other flag")
	}
	if o.print && o.install {
		return usageErrorf("--print and --install do not go together")
	}
	for i, d := range o.domains {
		host, err := tlscert.Hostname(d)
		if err != nil {
			return usageErrorf("--domain: %v", err)
		}
		o.domains[i] = host
	}
	return nil
}

func (o *caOptions) run(ctx context.Context, path string, out io.Writer) error {
	dir, err := openDataDir(path)
	if err != nil {
		return err
	}
	if o.uninstall {
		return uninstallAuthority(ctx, dir, out)
	}
	authority, err := o.open(dir)
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: the authority is root's: run it with sudo", err)
	}
	if err != nil {
		return err
	}
	if o.install {
		store, err := tlscert.OpenSystemStore(dir.tag())
		if err != nil {
			return err
		}
		if err := store.Install(ctx, authority); err != nil {
			return err
		}
	}
	if o.print {
		_, err := out.Write(authority.PEM())
		return err
	}
	return describeAuthority(dir, authority, out)
}

// open returns the authority that the options ask for.
func (o *caOptions) open(dir dataDir) (*tlscert.Authority, error) {
	files := dir.authority()
	if o.renew {
		return files.Replace(o.domains...)
	}
	authority, err := files.Open(o.domains...)
	if errors.Is(err, fs.ErrPermission) && len(o.domains) == 0 {
		// The key is root's, the certificate is for everybody.
		if published, perr := files.Published(); perr == nil {
			return published, nil
		}
	}
	if err != nil {
		return nil, err
	}
	for _, d := range o.domains {
		if err := authority.MayServe(d); err != nil {
			return nil, err
		}
	}
	return authority, nil
}

func describeAuthority(dir dataDir, authority *tlscert.Authority, out io.Writer) error {
	path := dir.authority().Public
	system, python := "wrenn ca --install", path+"    (in place of all others)"
	if string(dir) != defaultDataDir {
		system += " --data " + string(dir)
	}
	if store, err := tlscert.OpenSystemStore(dir.tag()); err == nil && store.Installed(authority) {
		system, python = "does already", store.Bundle()
	}
	_, err := fmt.Fprintf(out, `The certificate authority of this machine
  certificate   %s
  for           names at and below %s
  until         %s

Clients come to trust it:
  this system   %s
  Node.js       export NODE_EXTRA_CA_CERTS=%s
  Python        export SSL_CERT_FILE=%s
  curl          curl --cacert %s …
More, browsers too, is in docs/tls.md.
`, path, strings.Join(authority.Domains(), ", "), authority.Expires().Format(time.DateOnly), system, path, python, path)
	return err
}

func uninstallAuthority(ctx context.Context, dir dataDir, out io.Writer) error {
	store, err := tlscert.OpenSystemStore(dir.tag())
	if err != nil {
		return err
	}
	was, err := store.Uninstall(ctx)
	switch {
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: run it with sudo", err)
	case err != nil:
		return err
	case was:
		fmt.Fprintln(out, "The system does not trust it any more.")
	default:
		fmt.Fprintln(out, "It was not in the system's store.")
	}
	return nil
}
