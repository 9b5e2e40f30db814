// Package acmetest runs an ACME server for tests: Let's Encrypt's own for that
// purpose, Pebble, which really asks for what proves a domain. Beside it runs the
// DNS server of a zone that it asks, and that takes signed updates.
package acmetest

import (
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"
)

// Pebble reads it when a server is made. It would wait up to 15 seconds before it
// looks at a name.
func init() { os.Setenv("PEBBLE_VA_NOSLEEP", "1") }

// Server is an ACME server that can be stopped and started. It trusts nobody's
// word: what it signs it has looked at.
type Server struct {
	URL       string // of its directory
	RootsFile string // PEM, to trust for talking to it

	t       testing.TB
	ca      *ca.CAImpl
	handler http.Handler
	addr    string
	http    *httptest.Server

	mu     sync.Mutex
	orders int
}

// Config says how a Server sees the world.
type Config struct {
	DNS      string // host:port of the server that it asks for names
	TLSPort  int    // where it expects HTTPS of the names that it looks at
	HTTPPort int    // where it expects HTTP
	Lifetime uint64 // seconds for which its certificates are good; zero means 90 days
	Down     bool   // not started yet
}

// New makes a server, which ends with the test.
func New(t testing.TB, cfg Config) *Server {
	t.Helper()
	logger := log.New(io.Discard, "", 0)
	store := db.NewMemoryStore()
	s := &Server{t: t}
	s.ca = ca.New(logger, store, "", "ecdsa", 0, 1, map[string]ca.Profile{"default": {Description: "x", ValidityPeriod: cfg.Lifetime}})
	validation := va.New(logger, cfg.HTTPPort, cfg.TLSPort, false, cfg.DNS, store)
	const retryAfter = 0 // seconds
	front := wfe.New(logger, store, validation, s.ca, []string{"acme.test"}, false, false, retryAfter, retryAfter)
	inner := front.Handler()
	s.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/order-plz" {
			w = countCreated{w, s}
		}
		inner.ServeHTTP(w, r)
	})
	s.Start()
	s.RootsFile = filepath.Join(t.TempDir(), "acme-root.pem")
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.http.Certificate().Raw})
	if err := os.WriteFile(s.RootsFile, root, 0o600); err != nil {
		t.Fatal(err)
	}
	if cfg.Down {
		s.Stop()
	}
	t.Cleanup(s.Stop)
	return s
}

// countCreated counts orders that are taken: Pebble refuses some requests once, to
// see whether clients try again.
type countCreated struct {
	http.ResponseWriter
	s *Server
}

func (c countCreated) WriteHeader(status int) {
	if status == http.StatusCreated {
		c.s.mu.Lock()
		c.s.orders++
		c.s.mu.Unlock()
	}
	c.ResponseWriter.WriteHeader(status)
}

// Start lets it be reached at its address, the same one each time.
func (s *Server) Start() {
	s.t.Helper()
	addr := s.addr
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.http = &httptest.Server{Listener: ln, Config: &http.Server{Handler: s.handler, ErrorLog: log.New(io.Discard, "", 0)}}
	s.http.StartTLS()
	s.addr = ln.Addr().String()
	s.URL = s.http.URL + wfe.DirectoryPath
}

// Stop makes it unreachable.
func (s *Server) Stop() {
	s.http.CloseClientConnections()
	s.http.Close()
}

// Orders is how many certificates it has been asked for.
func (s *Server) Orders() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.orders
}

// Roots are what clients of its certificates have to trust.
func (s *Server) Roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(s.ca.GetRootCert(0).PEM())
	return pool
}
