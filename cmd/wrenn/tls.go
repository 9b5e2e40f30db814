package main

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"

	"github.com/spf13/pflag"

	"github.com/wrenn/wrenn/internal/server"
	"github.com/wrenn/wrenn/internal/server/tlscert"
)

// acmeOptions say which ACME server makes the certificates. The email is what
// switches it on.
type acmeOptions struct {
	Email  string `json:"email"`
	Server string `json:"server"` // name or URL
	Roots  string `json:"roots"`  // file
	DNS    string `json:"dns"`    // provider
}

const defaultACMEServer = "letsencrypt"

// tlsSource is where certificates come from.
type tlsSource string

const (
	tlsNone  tlsSource = ""
	tlsPair  tlsSource = "a certificate pair"
	tlsACME  tlsSource = "ACME"
	tlsLocal tlsSource = "this machine's own authority"
)

func (o *upOptions) addTLSFlags(f *pflag.FlagSet) {
	f.StringVar(&o.TLSListen, "tls-listen", "", "address for HTTPS at DOMAIN: with a certificate pair, ACME, or else an authority made for this machine (see: wrenn ca)")
	f.StringVar(&o.TLSCert, "tls-cert", "", "certificate (PEM) for DOMAIN and *.DOMAIN")
	f.StringVar(&o.TLSKey, "tls-key", "", "its private key (PEM)")
	f.StringVar(&o.ACME.Email, "acme-email", "", "get certificates from an ACME server, in the name of this address, and agree to its terms")
	f.StringVar(&o.ACME.Server, "acme-ca", "", "the ACME server: letsencrypt, letsencrypt-staging, or the URL of its directory (default "+defaultACMEServer+")")
	f.StringVar(&o.ACME.Roots, "acme-ca-root", "", "authority (PEM) to trust for a private ACME server")
	f.StringVar(&o.ACME.DNS, "acme-dns", "", "get a wildcard certificate by way of the domain's DNS: cloudflare or rfc2136, set up by environment variables")
}

// tlsSource says where the options take certificates from.
func (o *upOptions) tlsSource() tlsSource {
	switch {
	case o.TLSListen == "":
		return tlsNone
	case o.TLSCert != "" || o.TLSKey != "":
		return tlsPair
	case o.ACME != acmeOptions{}:
		return tlsACME
	}
	return tlsLocal
}

// checkTLS refuses what contradicts itself.
func (o *upOptions) checkTLS() error {
	acme := o.ACME != acmeOptions{}
	switch {
	case o.TLSListen == "" && (o.TLSCert != "" || o.TLSKey != ""):
		return usageErrorf("--tls-cert and --tls-key need --tls-listen")
	case o.TLSListen == "" && acme:
		return usageErrorf("--acme-email and the other --acme flags need --tls-listen")
	case o.TLSListen == "":
		return nil
	case o.Domain == "":
		return usageErrorf("--tls-listen needs --domain: certificates are made out to names")
	case (o.TLSCert == "") != (o.TLSKey == ""):
		return usageErrorf("--tls-cert and --tls-key go together")
	case o.TLSCert != "" && acme:
		return usageErrorf("certificates come from --tls-cert and --tls-key or from ACME, not from both")
	case acme && o.ACME.Email == "":
		return usageErrorf("--acme-ca, --acme-ca-root and --acme-dns need --acme-email")
	}
	if _, _, err := net.SplitHostPort(o.TLSListen); err != nil {
		return usageErrorf("--tls-listen: %v (want HOST:PORT)", err)
	}
	if o.tlsSource() == tlsPair {
		return nil // whatever name it is for
	}
	if _, err := tlscert.Hostname(o.Domain); err != nil {
		return usageErrorf("--domain: %v", err)
	}
	if !acme {
		return nil
	}
	return o.ACME.check()
}

func (o *acmeOptions) check() error {
	if o.Server == "" {
		o.Server = defaultACMEServer
	}
	if _, err := tlscert.Directory(o.Server); err != nil {
		return usageErrorf("--acme-ca: %v", err)
	}
	if o.DNS == "" {
		return nil
	}
	if err := tlscert.KnownDNSProvider(o.DNS); err != nil {
		return usageErrorf("--acme-dns: %v", err)
	}
	return nil
}

// certificates opens where the certificates come from. What runs for it is begun
// by serve.
func (p *platform) certificates(l server.Listeners) (*tls.Config, error) {
	switch p.opts.tlsSource() {
	case tlsPair:
		cert, err := server.LoadCertificate(p.opts.TLSCert, p.opts.TLSKey, p.log)
		if err != nil {
			return nil, err
		}
		return cert.TLSConfig(), nil
	case tlsACME:
		return p.openACME(l)
	default:
		local, err := tlscert.NewLocal(tlscert.LocalConfig{Files: p.dir.authority(), Domain: p.opts.Domain, Log: p.log})
		if err != nil {
			return nil, err
		}
		return local.TLSConfig(), nil
	}
}

func (p *platform) openACME(l server.Listeners) (*tls.Config, error) {
	directory, err := tlscert.Directory(p.opts.ACME.Server)
	if err != nil {
		return nil, err
	}
	cfg := tlscert.ACMEConfig{
		Domain: p.opts.Domain, Email: p.opts.ACME.Email, Directory: directory, Storage: p.dir.acme(), Log: p.log,
		TLSAddr: addrPort(l.TLS[0]), HTTPPort: challengePort(l),
		// Asked when clients come, and by then there is a control plane.
		Exists: func(ctx context.Context, id string) error {
			_, err := p.plane.Resolve(ctx, id)
			return err
		},
	}
	if p.opts.ACME.Roots != "" {
		if cfg.Roots, err = tlscert.LoadRoots(p.opts.ACME.Roots); err != nil {
			return nil, err
		}
	}
	if p.opts.ACME.DNS != "" {
		if cfg.DNS, err = tlscert.NewDNSProvider(p.opts.ACME.DNS); err != nil {
			return nil, err
		}
		if cfg.DNSResolver, err = tlscert.DNSResolver(); err != nil {
			return nil, err
		}
	}
	if p.acme, err = tlscert.NewACME(cfg); err != nil {
		return nil, err
	}
	return p.acme.TLSConfig(), nil
}

// challengePort is the port on which names may be proved over plain HTTP: 80, where
// the ACME server asks. With TLS on port 443 that is not needed, and when the
// platform itself listens on 80 it is taken.
func challengePort(l server.Listeners) int {
	const http, https = 80, 443
	if addrPort(l.TLS[0]).Port() == https || addrPort(l.Plain[0]).Port() == http {
		return 0
	}
	return http
}

func addrPort(l net.Listener) netip.AddrPort { return l.Addr().(*net.TCPAddr).AddrPort() }
