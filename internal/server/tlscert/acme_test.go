package tlscert_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/server/tlscert"
	"github.com/wrenn/wrenn/internal/server/tlscert/acmetest"
)

const running = "abcdefghij0123456789" // the id of the only sandbox

// worlds counts them: certmagic keeps what is under way by name, for the whole
// process, so that each world has names of its own.
var worlds atomic.Int32

// world is an ACME server, the domain's DNS, and a platform's certificates, which
// can be stopped and started again with what they have stored.
type world struct {
	t       *testing.T
	domain  string
	acme    *acmetest.Server
	zone    *acmetest.Zone
	config  tlscert.ACMEConfig
	addr    *net.TCPAddr
	log     *lockedBuffer
	tls     *tls.Config // what is served
	stop    func()
	refused []string // ids that were asked for and are of no sandbox
	mu      sync.Mutex
}

func newWorld(t *testing.T, server acmetest.Config) *world {
	t.Helper()
	w := &world{t: t, domain: fmt.Sprintf("w%d.wrenn.test", worlds.Add(1)), zone: acmetest.NewZone(t, "wrenn.test"), log: &lockedBuffer{}}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.addr = free.Addr().(*net.TCPAddr)
	free.Close()
	server.DNS = w.zone.Addr
	if server.TLSPort == 0 {
		server.TLSPort = w.addr.Port
	}
	w.acme = acmetest.New(t, server)
	trusted, err := tlscert.LoadRoots(w.acme.RootsFile)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "acme")
	if err != nil {
		t.Fatal(err)
	}
	w.config = tlscert.ACMEConfig{
		Domain: w.domain, Email: "admin@wrenn.test", Directory: w.acme.URL, Roots: trusted,
		Storage: filepath.Join(dir, "acme"), TLSAddr: w.addr.AddrPort(), HTTPPort: server.HTTPPort,
		Exists: w.exists, Log: w.log.logger(), FirstRetry: 200 * time.Millisecond,
	}
	t.Cleanup(func() {
		if w.stop != nil {
			w.stop()
		}
		// A renewal that had begun ends a moment later, and writes until then.
		eventually(t, "storage is removed", func() error { return os.RemoveAll(dir) })
		if t.Failed() {
			t.Log(w.log.String())
		}
	})
	return w
}

func (w *world) exists(_ context.Context, id string) error {
	if id == running {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refused = append(w.refused, id)
	return sandbox.Errorf(sandbox.ErrNotFound, "sandbox %s not found", id)
}

// byDNS has the domain proved by records in its zone.
func (w *world) byDNS() {
	w.t.Helper()
	w.t.Setenv("RFC2136_NAMESERVER", w.zone.Addr)
	w.t.Setenv("RFC2136_TSIG_KEY", strings.TrimSuffix(acmetest.KeyName, "."))
	w.t.Setenv("RFC2136_TSIG_SECRET", acmetest.KeySecret)
	w.t.Setenv("ACME_DNS_RESOLVER", w.zone.Addr)
	var err1, err2 error
	w.config.DNS, err1 = tlscert.NewDNSProvider("rfc2136")
	w.config.DNSResolver, err2 = tlscert.DNSResolver()
	if err := errors.Join(err1, err2); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) start() {
	w.t.Helper()
	a, err := tlscert.NewACME(w.config)
	if err != nil {
		w.t.Fatal(err)
	}
	ln, err := net.Listen("tcp", w.addr.String())
	if err != nil {
		w.t.Fatal(err)
	}
	w.tls = a.TLSConfig()
	close := serveOn(w.t, ln, w.tls)
	ctx, cancel := context.WithCancel(w.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	w.stop = sync.OnceFunc(func() {
		close()
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				w.t.Error(err)
			}
		case <-time.After(patience):
			w.t.Error("Run does not end")
		}
	})
}

func (w *world) handshake(name string) (*x509.Certificate, error) {
	return handshake(w.addr, name, w.acme.Roots())
}

func (w *world) serves(name string) (leaf *x509.Certificate) {
	w.t.Helper()
	eventually(w.t, "certificate for "+name, func() (err error) {
		leaf, err = w.handshake(name)
		return err
	})
	return leaf
}

func (w *world) host(port int, id string) string { return fmt.Sprintf("%d-%s.%s", port, id, w.domain) }

func TestACMEByDNSGivesAWildcard(t *testing.T) {
	w := newWorld(t, acmetest.Config{})
	w.byDNS()
	w.start()
	w.serves(w.domain)
	leaf := w.serves("api." + w.domain)
	for _, name := range []string{w.host(3000, running), w.host(8080, "zzzzzzzzzzzzzzzzzzzz"), "sandbox." + w.domain} {
		got, err := w.handshake(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if !got.Equal(leaf) {
			t.Errorf("%s: a certificate of its own, for %v", name, got.DNSNames)
		}
	}
	if got := w.acme.Orders(); got != 2 {
		t.Errorf("%d orders, want one for the domain and one for the wildcard", got)
	}
	eventually(t, "records are removed", func() error {
		if left := w.zone.TXT("wrenn.test"); len(left) > 0 {
			return fmt.Errorf("left: %v", left)
		}
		return nil
	})
	if w.zone.Updates() < 4 {
		t.Errorf("%d updates", w.zone.Updates())
	}
}

func TestACMEWithoutDNSGivesCertificatesToSandboxesThatExist(t *testing.T) {
	t.Parallel()
	w := newWorld(t, acmetest.Config{})
	w.start()
	for _, name := range []string{w.domain, "api." + w.domain, "sandbox." + w.domain} {
		w.serves(name)
	}
	before := w.acme.Orders()
	if before != 3 {
		t.Errorf("%d orders for the platform's own names", before)
	}
	// Many clients at once, one order.
	var clients sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			if _, err := w.handshake(w.host(3000, running)); err != nil {
				t.Errorf("a running sandbox: %v", err)
			}
		})
	}
	clients.Wait()
	if got := w.acme.Orders() - before; got != 1 {
		t.Errorf("%d orders for one host", got)
	}

	before = w.acme.Orders()
	for _, name := range []string{
		w.host(3000, "zzzzzzzzzzzzzzzzzzzz"), "nosuch." + w.domain, "70000-" + running + "." + w.domain, "0-" + running + "." + w.domain,
		"x." + w.host(3000, running), w.host(3000, running[:10]), "3000-" + running + ".other.test", "example.com", "1-2-3-4." + w.domain,
	} {
		if _, err := w.handshake(name); err == nil {
			t.Errorf("%s has a certificate", name)
		}
	}
	if got := w.acme.Orders() - before; got != 0 {
		t.Errorf("%d orders for names that are nobody's", got)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.refused) != 1 {
		t.Errorf("asked for %v: want the one well-formed id alone", w.refused)
	}
}

func TestNamesAreProvedOverPlainHTTPWhereTLSIsNotReached(t *testing.T) {
	t.Parallel()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	free.Close()
	w := newWorld(t, acmetest.Config{HTTPPort: port, TLSPort: 1}) // nobody answers there
	w.start()
	for _, name := range []string{w.domain, "api." + w.domain, "sandbox." + w.domain, w.host(3000, running)} {
		w.serves(name)
	}
}

func TestAnOrderGoesOnWhenTheHandshakeIsGivenUp(t *testing.T) {
	t.Parallel()
	w := newWorld(t, acmetest.Config{})
	w.start()
	for _, name := range []string{w.domain, "api." + w.domain, "sandbox." + w.domain} {
		w.serves(name)
	}
	before := w.acme.Orders()
	here, there := net.Pipe()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	var client sync.WaitGroup
	client.Go(func() {
		tls.Client(there, &tls.Config{ServerName: w.host(3000, running), RootCAs: w.acme.Roots()}).Handshake()
	})
	if err := tls.Server(here, w.tls).HandshakeContext(ctx); err == nil {
		t.Error("a certificate within 50 ms: this tests nothing")
	}
	there.Close()
	client.Wait()
	w.serves(w.host(3000, running))
	if got := w.acme.Orders() - before; got != 1 {
		t.Errorf("%d orders, want the one that was begun", got)
	}
}

func TestCertificatesAreKeptOverARestart(t *testing.T) {
	t.Parallel()
	w := newWorld(t, acmetest.Config{})
	w.start()
	names := []string{"api." + w.domain, w.host(3000, running)}
	var before []*x509.Certificate
	for _, name := range names {
		before = append(before, w.serves(name))
	}
	w.serves(w.domain)
	w.serves("sandbox." + w.domain)
	orders := w.acme.Orders()
	w.stop()
	w.start()
	for i, name := range names {
		if got := w.serves(name); !got.Equal(before[i]) {
			t.Errorf("%s: another certificate after the restart", name)
		}
	}
	if got := w.acme.Orders(); got != orders {
		t.Errorf("%d new orders after a restart", got-orders)
	}
	// The ACME server may be down as well.
	w.stop()
	w.acme.Stop()
	w.start()
	for i, name := range names {
		if got := w.serves(name); !got.Equal(before[i]) {
			t.Errorf("%s: another certificate while the server is down", name)
		}
	}
	w.acme.Start() // for the clean-up
}

func TestWithoutTheServerHandshakesFailAtOnceUntilItIsThere(t *testing.T) {
	t.Parallel()
	w := newWorld(t, acmetest.Config{Down: true})
	w.start()
	eventually(t, "the log says it", func() error {
		if said := w.log.String(); !strings.Contains(said, "no TLS certificate from the ACME server") || !strings.Contains(said, "connection refused") || !strings.Contains(said, "trying_again_in") {
			return errors.New(said)
		}
		return nil
	})
	begin := time.Now()
	if _, err := w.handshake("api." + w.domain); err == nil {
		t.Error("served without a certificate")
	}
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("a handshake that cannot succeed took %s", took)
	}
	w.acme.Start()
	w.serves("api." + w.domain)
	w.serves(w.domain)
}

func TestShortLivedCertificatesAreRenewedWhileServing(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for a renewal")
	}
	w := newWorld(t, acmetest.Config{Lifetime: 12})
	w.byDNS()
	w.config.RenewCheck = time.Second
	w.start()
	first := w.serves("api." + w.domain)
	eventually(t, "another certificate", func() error {
		got, err := w.handshake("api." + w.domain)
		if err != nil {
			return err
		}
		if got.Equal(first) {
			return errors.New("the same certificate still")
		}
		return nil
	})
}

func TestWhatIsStoredIsForRootAlone(t *testing.T) {
	t.Parallel()
	w := newWorld(t, acmetest.Config{})
	if err := os.MkdirAll(w.config.Storage, 0o755); err != nil {
		t.Fatal(err)
	}
	w.start()
	w.serves("api." + w.domain)
	keys := 0
	err := filepath.WalkDir(w.config.Storage, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) { // a lock that was let go of
			return nil
		}
		if err != nil {
			return err
		}
		if strings.HasSuffix(path, ".key") {
			keys++
			if info.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s: %v", path, info.Mode())
			}
		}
		if path == w.config.Storage && info.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v", path, info.Mode())
		}
		return nil
	})
	if err != nil || keys == 0 {
		t.Errorf("%d keys, %v", keys, err)
	}
}

func TestServersAreNamedOrGivenByURL(t *testing.T) {
	for server, want := range map[string]string{
		"letsencrypt":                     "https://acme-v02.api.letsencrypt.org/directory",
		"letsencrypt-staging":             "https://acme-staging-v02.api.letsencrypt.org/directory",
		"https://ca.example.com/acme/dir": "https://ca.example.com/acme/dir",
	} {
		if got, err := tlscert.Directory(server); err != nil || got != want {
			t.Errorf("%s: %s, %v", server, got, err)
		}
	}
	for _, server := range []string{"", "letsencript", "http://ca.example.com/dir", "ca.example.com", "https://"} {
		if got, err := tlscert.Directory(server); err == nil {
			t.Errorf("%q: %s", server, got)
		}
	}
}
