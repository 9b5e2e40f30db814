package tlscert

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3"
	"go.uber.org/zap"
)

const (
	firstRetry   = time.Minute
	longestRetry = 30 * time.Minute
	// Shorter than the wait before certmagic's own second attempt.
	handshakeLimit = 50 * time.Second
	cleanInterval  = 24 * time.Hour
	// What has ended is kept for a while, to look at when something went wrong.
	cleanGrace = 14 * 24 * time.Hour
)

// acmeNames are the servers that have a name of their own here.
var acmeNames = map[string]string{
	"letsencrypt":         certmagic.LetsEncryptProductionCA,
	"letsencrypt-staging": certmagic.LetsEncryptStagingCA,
}

// Directory returns the URL of an ACME server given by name or URL.
func Directory(server string) (string, error) {
	if known, ok := acmeNames[server]; ok {
		return known, nil
	}
	u, err := url.Parse(server)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return "", fmt.Errorf("%q is no ACME server: want letsencrypt, letsencrypt-staging, or the https URL of its directory", server)
	}
	return server, nil
}

// ACMEConfig is what an ACME needs.
type ACMEConfig struct {
	Domain    string // of the platform, may have a port
	Email     string // of the account; giving it means agreeing to the server's terms
	Directory string // URL of the ACME server, see Directory
	Storage   string // directory for account, keys and certificates, for root alone

	// Roots are trusted for the server instead of the host's. Nil: the host's.
	Roots *x509.CertPool
	// DNS proves that the domain is ours, by records in its zone; with it there is
	// a wildcard certificate. Nil: by answering on the names themselves.
	DNS DNSProvider
	// DNSResolver is asked for the domain's zone, and whether the record is there,
	// host:port. Empty: the host's resolver, then the zone's own servers.
	DNSResolver string
	// TLSAddr is where the configuration is served; used without DNS.
	TLSAddr netip.AddrPort
	// HTTPPort is listened on while names are being proved, on TLSAddr's address;
	// the server asks on port 80. Zero: never. Used without DNS.
	HTTPPort int
	// Exists returns nil for the id of a sandbox that there is: only such a one
	// gets a certificate. Used without DNS.
	Exists func(ctx context.Context, id string) error

	Log *slog.Logger
	// FirstRetry is the wait after a first failure; it doubles up to half an hour.
	// Zero means a minute: servers take few failures an hour.
	FirstRetry time.Duration
	// RenewCheck is how often it is looked whether a certificate is to be renewed,
	// which is when a third of its time is left. Zero means every ten minutes.
	RenewCheck time.Duration
}

// ACME serves certificates of an ACME server, and gets and renews them while Run
// runs. With DNS that is one for the domain and one for its wildcard. Without, it
// is one each for the domain and the platform's hosts below it, and one for every
// host of a sandbox when the first client comes for it.
type ACME struct {
	host  string
	names []string // what Run gets
	log   *slog.Logger
	retry time.Duration

	storage  *certmagic.FileStorage
	cache    *certmagic.Cache
	managed  *certmagic.Config // serves and renews what Run gets
	onDemand *certmagic.Config // serves hosts of sandboxes; nil with DNS
	gate     *gate
	zap      *zap.Logger

	life context.Context // of what handshakes begin; Run ends it
	end  context.CancelFunc
}

// platformHosts are the labels below the domain that are no sandboxes.
var platformHosts = []string{"api", "sandbox"}

// NewACME prepares the storage. It asks nobody for anything: Run does.
func NewACME(cfg ACMEConfig) (*ACME, error) {
	host, err := Hostname(cfg.Domain)
	if err != nil {
		return nil, err
	}
	err = os.MkdirAll(cfg.Storage, 0o700)
	if err == nil {
		err = os.Chmod(cfg.Storage, 0o700)
	}
	if err != nil {
		return nil, fmt.Errorf("make directory for certificates: %w", err)
	}
	a := &ACME{
		host: host, names: []string{host}, log: cfg.Log, retry: cfg.FirstRetry,
		storage: &certmagic.FileStorage{Path: cfg.Storage},
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if a.retry == 0 {
		a.retry = firstRetry
	}
	a.life, a.end = context.WithCancel(context.Background())
	a.zap = zap.New(slogCore{handler: a.log.Handler()})
	if cfg.DNS != nil {
		a.names = append(a.names, "*."+host)
	} else {
		for _, label := range platformHosts {
			a.names = append(a.names, label+"."+host)
		}
	}
	a.cache = certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert: a.configFor, RenewCheckInterval: cfg.RenewCheck, Logger: a.zap,
	})
	a.managed = a.config(cfg, nil)
	if cfg.DNS == nil {
		a.gate = &gate{host: host, exists: cfg.Exists}
		a.onDemand = a.config(cfg, &certmagic.OnDemandConfig{DecisionFunc: a.gate.admit})
	}
	return a, nil
}

func (a *ACME) config(cfg ACMEConfig, onDemand *certmagic.OnDemandConfig) *certmagic.Config {
	c := certmagic.New(a.cache, certmagic.Config{
		Storage: a.storage, OnDemand: onDemand, Logger: a.zap, OnEvent: a.onEvent,
		DefaultServerName: a.host, // for clients that ask for no name
		// Revocation is not asked for: the largest authorities have no responder
		// any more, and the answer would be waited for at the start.
		OCSP: certmagic.OCSPConfig{DisableStapling: true},
	})
	issuer := certmagic.ACMEIssuer{
		CA: cfg.Directory, Email: cfg.Email, Agreed: true, TrustedRoots: cfg.Roots, Logger: a.zap,
		AltHTTPPort: cfg.HTTPPort, DisableHTTPChallenge: cfg.HTTPPort == 0,
	}
	if cfg.TLSAddr.IsValid() {
		issuer.ListenHost, issuer.AltTLSALPNPort = cfg.TLSAddr.Addr().Unmap().String(), int(cfg.TLSAddr.Port())
	}
	if cfg.DNS != nil {
		solver := &certmagic.DNS01Solver{DNSManager: certmagic.DNSManager{DNSProvider: cfg.DNS, TTL: time.Minute, Logger: a.zap}}
		if cfg.DNSResolver != "" {
			solver.Resolvers = []string{cfg.DNSResolver}
		}
		issuer.DNS01Solver = solver
	}
	c.Issuers = []certmagic.Issuer{certmagic.NewACMEIssuer(c, issuer)}
	return c
}

// configFor tells the cache who renews a certificate.
func (a *ACME) configFor(cert certmagic.Certificate) (*certmagic.Config, error) {
	if a.onDemand == nil || slices.ContainsFunc(cert.Names, a.isManaged) {
		return a.managed, nil
	}
	return a.onDemand, nil
}

func (a *ACME) isManaged(name string) bool { return slices.Contains(a.names, name) }

// TLSConfig returns a configuration that serves the certificates that there are,
// and answers the ACME server's questions. A handshake for a name that has none
// fails.
func (a *ACME) TLSConfig() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{acmez.ACMETLS1Protocol}, // the HTTP server adds its own
		GetCertificate: a.certificate,
	}
}

func (a *ACME) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	name := strings.ToLower(strings.TrimSuffix(hello.ServerName, "."))
	if a.onDemand == nil || name == "" || a.isManaged(name) {
		return a.managed.GetCertificate(hello)
	}
	// The server gives up on a handshake after some seconds. What has begun goes on
	// all the same, and the client's next attempt finds the certificate.
	ctx, cancel := context.WithTimeout(a.life, handshakeLimit)
	defer cancel()
	return a.onDemand.GetCertificateWithContext(ctx, hello)
}

// Run gets what is missing, tries again while that fails, and renews, until ctx is
// done. It returns nil then. It must be called once.
func (a *ACME) Run(ctx context.Context) error {
	defer a.end()
	defer a.cache.Stop() // renews, from the first certificate on
	var running sync.WaitGroup
	for _, name := range a.names {
		running.Go(func() { a.obtain(ctx, name) })
	}
	running.Go(func() { a.cleanUp(ctx) })
	running.Wait()
	return nil
}

// obtain loads the certificate for name, or gets it from the server.
func (a *ACME) obtain(ctx context.Context, name string) {
	for wait := a.retry; ; wait = min(2*wait, longestRetry) {
		// A stored one is served before it is tried to renew it.
		err := a.managed.ManageSync(ctx, []string{name})
		if err == nil || ctx.Err() != nil {
			return
		}
		a.log.Error("no TLS certificate from the ACME server; plain HTTP works, HTTPS does where an earlier certificate is still good",
			"name", name, "err", err, "trying_again_in", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// cleanUp removes what has ended, such as the certificates of sandboxes that are
// gone, until ctx is done.
func (a *ACME) cleanUp(ctx context.Context) {
	ticks := time.NewTicker(cleanInterval)
	defer ticks.Stop()
	for {
		err := certmagic.CleanStorage(ctx, a.storage, certmagic.CleanStorageOptions{
			Logger: a.zap, Interval: cleanInterval / 2, ExpiredCerts: true, ExpiredCertGracePeriod: cleanGrace,
		})
		if err != nil && ctx.Err() == nil {
			a.log.Warn("remove ended certificates", "err", err)
		}
		select {
		case <-ticks.C:
		case <-ctx.Done():
			return
		}
	}
}

func (a *ACME) onEvent(_ context.Context, event string, data map[string]any) error {
	switch event {
	case "cert_obtained":
		a.log.Info("got a TLS certificate", "name", data["identifier"], "issuer", data["issuer"], "renewal", data["renewal"])
	case "cert_failed":
		if name, ok := data["identifier"].(string); ok && a.gate != nil {
			a.gate.failed(name)
		}
	}
	return nil
}

// LoadRoots reads authorities to trust, PEM.
func LoadRoots(path string) (*x509.CertPool, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read certificate authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("read certificate authority %s: %w", path, errors.New("no PEM certificate in it"))
	}
	return pool, nil
}
