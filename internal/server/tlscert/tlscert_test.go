package tlscert_test

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/server/tlscert"
)

const patience = 30 * time.Second

// serveTLS serves "hello" over HTTPS as the platform's front does, and returns
// the listener's address.
func serveTLS(t *testing.T, config *tls.Config) *net.TCPAddr {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, ln, config)
	return ln.Addr().(*net.TCPAddr)
}

func serveOn(t *testing.T, ln net.Listener, config *tls.Config) (stop func()) {
	t.Helper()
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	s := &http.Server{
		TLSConfig: config, Protocols: &protocols, ReadHeaderTimeout: 10 * time.Second,
		Handler:  http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello from "+r.Host) }),
		ErrorLog: quiet,
	}
	var serving sync.WaitGroup
	serving.Go(func() { s.ServeTLS(ln, "", "") })
	stop = sync.OnceFunc(func() { s.Close(); serving.Wait() })
	t.Cleanup(stop)
	return stop
}

// handshake returns the certificate that a client which trusts roots accepts for
// name.
func handshake(addr net.Addr, name string, roots *x509.CertPool) (*x509.Certificate, error) {
	dialer := &net.Dialer{Timeout: patience}
	conn, err := tls.DialWithDialer(dialer, "tcp", addr.String(), &tls.Config{ServerName: name, RootCAs: roots})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0], nil
}

func files(t *testing.T) tlscert.Files {
	dir := t.TempDir()
	return tlscert.Files{Private: filepath.Join(dir, "keys", "ca.pem"), Public: filepath.Join(dir, "ca.pem")}
}

func roots(a *tlscert.Authority) *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(a.PEM())
	return pool
}

// eventually waits until check returns nil.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s: %v", what, patience, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestHostnamesAreTakenFromDomainsThatClientsAcceptWildcardsFor(t *testing.T) {
	for domain, want := range map[string]string{
		"sandboxes.example.com": "sandboxes.example.com", "E2B.localhost:8443": "e2b.localhost", "a.b.": "a.b", "xn--bcher-kva.example": "xn--bcher-kva.example",
	} {
		if got, err := tlscert.Hostname(domain); err != nil || got != want {
			t.Errorf("%s: %q, %v", domain, got, err)
		}
	}
	for domain, want := range map[string]string{
		"": "no host name", "localhost": "one label", "localhost:8443": "one label", "127.0.0.1": "address", "[::1]:443": "address",
		"*.example.com": "no host name", "bücher.example": "no host name", "a..b": "no host name", "-a.b": "no host name",
		"a b.c": "no host name", strings.Repeat("abcd.", 48) + "com": "too long",
	} {
		if _, err := tlscert.Hostname(domain); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", domain, err, want)
		}
	}
}
