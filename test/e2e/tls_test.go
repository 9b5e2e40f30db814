package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/server/tlscert/acmetest"
)

// secure is a platform that serves a domain over TLS.
type secure struct {
	*platform
	domain string // without port
	port   int    // of TLS
}

func startSecure(t *testing.T, domain string, port int, flags ...string) *secure {
	t.Helper()
	p := newPlatform(t, append([]string{
		"--domain", fmt.Sprintf("%s:%d", domain, port), "--tls-listen", fmt.Sprintf("127.0.0.1:%d", port),
	}, flags...)...)
	p.start()
	return &secure{p, domain, port}
}

// get asks for a page of a host as a client of its own does that trusts roots,
// and returns the page and the certificate.
func (s *secure) get(host string, roots *x509.CertPool) (string, *x509.Certificate, error) {
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, fmt.Sprintf("127.0.0.1:%d", s.port))
		},
	}}
	resp, err := client.Get(fmt.Sprintf("https://%s.%s:%d/", host, s.domain, s.port))
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	return string(page), resp.TLS.PeerCertificates[0], err
}

// sees waits until the host shows a page with this in it.
func (s *secure) sees(host, want string, roots *x509.CertPool) *x509.Certificate {
	s.t.Helper()
	var leaf *x509.Certificate
	eventually(s.t, 30*time.Second, "page at "+host, func() error {
		page, cert, err := s.get(host, roots)
		if err == nil && !strings.Contains(page, want) {
			err = fmt.Errorf("%.200s", page)
		}
		leaf = cert
		return err
	})
	return leaf
}

// withPage starts a sandbox that serves a page on port 8000.
func (s *secure) withPage() *box {
	b := s.create(nil)
	b.run(`mkdir /tmp/www && echo "page of the sandbox" >/tmp/www/index.html
setsid -f python3 -m http.server --directory /tmp/www 8000 >/dev/null 2>&1 </dev/null`)
	return b
}

func rootsIn(t *testing.T, path string) *x509.CertPool {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		t.Fatalf("no certificate in %s", path)
	}
	return pool
}

func TestADomainIsServedWithTheMachinesOwnAuthority(t *testing.T) {
	s := startSecure(t, "e2b.localhost", freePort(t))
	authority := filepath.Join(s.dir, "ca.pem")
	roots := rootsIn(t, authority)
	b := s.withPage()
	s.sees("8000-"+b.id, "page of the sandbox", roots)
	if _, _, err := s.get("api", x509.NewCertPool()); err == nil {
		t.Error("a client that does not trust the authority gets through")
	}

	out, err := exec.Command(suite.bin, "ca", "--data", s.dir, "--print").Output()
	if data, _ := os.ReadFile(authority); err != nil || string(out) != string(data) {
		t.Errorf("wrenn ca --print: %v: %s", err, out)
	}
	// What wrenn env says is enough for Node.js to get to the sandbox's page.
	script := fmt.Sprintf(`eval "$(%s env --data %s)"; node -e '
		require("https").get({host: "127.0.0.1", port: %d, servername: "8000-%s.e2b.localhost", headers: {host: "8000-%[4]s.e2b.localhost"}},
			r => r.pipe(process.stdout)).on("error", e => { console.error(e); process.exit(1) })'`, suite.bin, s.dir, s.port, b.id)
	node := exec.Command("sh", "-c", script)
	node.Env = os.Environ()
	if out, err := node.CombinedOutput(); err != nil || !strings.Contains(string(out), "page of the sandbox") {
		t.Errorf("node: %v: %s", err, out)
	}

	// A crash changes nothing for clients, another authority takes no restart.
	s.end(syscall.SIGKILL)
	s.start()
	s.sees("8000-"+b.id, "page of the sandbox", roots)
	if out, err := exec.Command(suite.bin, "ca", "--data", s.dir, "--new").CombinedOutput(); err != nil {
		t.Fatalf("wrenn ca --new: %v: %s", err, out)
	}
	if _, _, err := s.get("api", roots); err == nil {
		t.Error("still serves what the old authority signed")
	}
	s.sees("8000-"+b.id, "page of the sandbox", rootsIn(t, authority))
}

func TestSandboxesGetCertificatesFromAnACMEServer(t *testing.T) {
	zone := acmetest.NewZone(t, "wrenn.test")
	port := freePort(t)
	acme := acmetest.New(t, acmetest.Config{DNS: zone.Addr, TLSPort: port, Down: true})
	s := startSecure(t, "boxes.wrenn.test", port, "--acme-email", "admin@wrenn.test", "--acme-ca", acme.URL, "--acme-ca-root", acme.RootsFile)

	// The server is down: plain HTTP works, the log says why HTTPS does not.
	b := s.withPage()
	eventually(t, 30*time.Second, "the log says it", func() error {
		if log, _ := os.ReadFile(s.log); !strings.Contains(string(log), "no TLS certificate from the ACME server") {
			return fmt.Errorf("log: %s", log)
		}
		return nil
	})
	if _, _, err := s.get("api", acme.Roots()); err == nil {
		t.Error("HTTPS without a certificate")
	}

	acme.Start()
	s.end(syscall.SIGTERM) // rather than wait for the next attempt
	s.start()
	leaf := s.sees("8000-"+b.id, "page of the sandbox", acme.Roots())
	api := s.sees("api", "", acme.Roots())
	if _, _, err := s.get("8000-zzzzzzzzzzzzzzzzzzzz", acme.Roots()); err == nil {
		t.Error("a sandbox that does not exist has a certificate")
	}
	s.sees("sandbox", "", acme.Roots())
	eventually(t, 30*time.Second, "all of the platform's own names have one", func() error {
		if got := acme.Orders(); got < 4 {
			return fmt.Errorf("%d orders", got)
		}
		return nil
	})

	// What it has got survives a crash, and a server that is down.
	orders := acme.Orders()
	s.end(syscall.SIGKILL)
	acme.Stop()
	s.start()
	if again := s.sees("8000-"+b.id, "page of the sandbox", acme.Roots()); !again.Equal(leaf) {
		t.Error("the sandbox's host has another certificate after a crash")
	}
	if again := s.sees("api", "", acme.Roots()); !again.Equal(api) {
		t.Error("the API has another certificate after a crash")
	}
	if got := acme.Orders(); got != orders {
		t.Errorf("%d more orders", got-orders)
	}
	acme.Start() // for the clean-up

	// With the sandbox goes the right to a certificate.
	if status, body := s.api("DELETE", "/sandboxes/"+b.id, nil); status != http.StatusNoContent {
		t.Fatalf("kill: %d %s", status, body)
	}
	if _, _, err := s.get("9000-"+b.id, acme.Roots()); err == nil {
		t.Error("a sandbox that is gone gets a certificate")
	}
}

func TestADomainWithDNSGetsAWildcardCertificate(t *testing.T) {
	zone := acmetest.NewZone(t, "wrenn.test")
	port := freePort(t)
	acme := acmetest.New(t, acmetest.Config{DNS: zone.Addr, TLSPort: port})
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(acmetest.KeySecret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("RFC2136_NAMESERVER", zone.Addr)
	t.Setenv("RFC2136_TSIG_KEY", acmetest.KeyName)
	t.Setenv("RFC2136_TSIG_SECRET_FILE", secret)
	t.Setenv("ACME_DNS_RESOLVER", zone.Addr)
	s := startSecure(t, "boxes.wrenn.test", port, "--acme-email", "admin@wrenn.test", "--acme-ca", acme.URL,
		"--acme-ca-root", acme.RootsFile, "--acme-dns", "rfc2136")
	leaf := s.sees("8000-"+s.withPage().id, "page of the sandbox", acme.Roots())
	other := s.sees("8000-"+s.withPage().id, "page of the sandbox", acme.Roots())
	if !other.Equal(leaf) || leaf.DNSNames[0] != "*.boxes.wrenn.test" {
		t.Errorf("certificates for %v and %v", leaf.DNSNames, other.DNSNames)
	}
}

// In a mount namespace, in which the system's store is a copy.
func TestTheAuthorityGoesIntoTheSystemsStoreAndOutAgain(t *testing.T) {
	if suite.skip != "" {
		t.Skip(suite.skip)
	}
	for _, program := range []string{"unshare", "update-ca-certificates", "openssl"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	const script = `set -eu
mount -t tmpfs none /usr/local/share/ca-certificates
cp -a /etc/ssl/certs "$D/certs"
mount --bind "$D/certs" /etc/ssl/certs
bundle=/etc/ssl/certs/ca-certificates.crt
trusted() { openssl verify -CAfile $bundle "$D/ca.pem" >/dev/null 2>&1; }
untrusted() { if trusted; then exit 1; fi; }
"$W" ca --data "$D" | grep -q 'wrenn ca --install'
untrusted
"$W" ca --data "$D" --install | grep -q 'this system   does already'
trusted
"$W" ca --data "$D" --new | grep -q 'wrenn ca --install'
untrusted
[ "$(ls /usr/local/share/ca-certificates | wc -l)" = 1 ]
"$W" ca --data "$D" --uninstall | grep -q 'any more'
[ "$(ls /usr/local/share/ca-certificates | wc -l)" = 0 ]
"$W" ca --data "$D" --uninstall | grep -q 'was not'
PATH=/nowhere "$W" ca --data "$D" --install 2>&1 | grep -q 'update-ca-trust'
echo good
`
	cmd := exec.Command("unshare", "-m", "sh", "-xc", script)
	cmd.Env = append(os.Environ(), "W="+suite.bin, "D="+t.TempDir())
	if out, err := cmd.CombinedOutput(); err != nil || !strings.HasSuffix(string(out), "good\n") {
		t.Errorf("%v\n%s", err, out)
	}
}
