package tlscert_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/server/tlscert"
)

var quiet = log.New(io.Discard, "", 0)

// lockedBuffer is a log that may be read while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *lockedBuffer) logger() *slog.Logger { return slog.New(slog.NewTextHandler(b, nil)) }

// local opens a Local and serves it; it returns the address and its authority.
func local(t *testing.T, cfg tlscert.LocalConfig) (*net.TCPAddr, *tlscert.Authority) {
	t.Helper()
	l, err := tlscert.NewLocal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	authority, err := cfg.Files.Published()
	if err != nil {
		t.Fatal(err)
	}
	return serveTLS(t, l.TLSConfig()), authority
}

func TestTheMachinesAuthorityServesADomainAndItsWildcard(t *testing.T) {
	addr, authority := local(t, tlscert.LocalConfig{Files: files(t), Domain: "e2b.localhost:8443"})
	for _, name := range []string{"e2b.localhost", "api.e2b.localhost", "3000-abcdefghij0123456789.e2b.localhost", "E2B.localhost"} {
		leaf, err := handshake(addr, name, roots(authority))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if left := time.Until(leaf.NotAfter); left > 90*24*time.Hour || left < 24*time.Hour {
			t.Errorf("%s: good for another %s", name, left)
		}
	}
	for _, name := range []string{"localhost", "a.b.e2b.localhost", "example.com"} {
		if _, err := handshake(addr, name, roots(authority)); err == nil {
			t.Errorf("a client takes it for %s", name)
		}
	}
	if _, err := handshake(addr, "api.e2b.localhost", x509.NewCertPool()); err == nil {
		t.Error("a client that does not trust the authority takes the certificate")
	}
}

// Each of these clients has a TLS library, or rules on top of it, of its own.
func TestClientsThatTrustTheAuthorityAcceptIt(t *testing.T) {
	t.Parallel()
	f := files(t)
	addr, _ := local(t, tlscert.LocalConfig{Files: f, Domain: "e2b.localhost"})
	for _, host := range []string{"api.e2b.localhost", "3000-abcdefghij0123456789.e2b.localhost"} {
		url := fmt.Sprintf("https://%s:%d/", host, addr.Port)
		node := `require("https").get({host: "127.0.0.1", port: ` + fmt.Sprint(addr.Port) + `, servername: "` + host + `", headers: {host: "` + host + `"}},
			r => r.pipe(process.stdout)).on("error", e => { console.error(e); process.exit(1) })`
		python := `import socket, ssl, sys
c = ssl.create_default_context().wrap_socket(socket.create_connection(("127.0.0.1", ` + fmt.Sprint(addr.Port) + `)), server_hostname="` + host + `")
c.sendall(b"GET / HTTP/1.0\r\nHost: ` + host + `\r\n\r\n")
while data := c.recv(4096): sys.stdout.write(data.decode())`
		for name, args := range map[string][]string{
			"curl":    {"curl", "-sS", "--cacert", f.Public, "--resolve", fmt.Sprintf("%s:%d:127.0.0.1", host, addr.Port), url},
			"node":    {"node", "-e", node},
			"python":  {"python3", "-c", python},
			"openssl": {"openssl", "s_client", "-connect", addr.String(), "-servername", host, "-verify_hostname", host, "-verify_return_error", "-CAfile", f.Public, "-brief"},
		} {
			t.Run(name+" "+host, func(t *testing.T) {
				if _, err := exec.LookPath(args[0]); err != nil {
					t.Skip(err)
				}
				run := func(env ...string) (string, error) {
					cmd := exec.Command(args[0], args[1:]...)
					cmd.Env = append(os.Environ(), env...)
					cmd.Stdin = strings.NewReader("GET / HTTP/1.0\r\nHost: " + host + "\r\n\r\n")
					out, err := cmd.CombinedOutput()
					return string(out), err
				}
				trusting := []string{"NODE_EXTRA_CA_CERTS=" + f.Public, "SSL_CERT_FILE=" + f.Public, "SSL_CERT_DIR="}
				if out, err := run(trusting...); err != nil || (name != "openssl" && !strings.Contains(out, "hello from "+host)) {
					t.Errorf("%v: %s", err, out)
				}
				if name == "node" || name == "python" {
					if out, err := run("NODE_EXTRA_CA_CERTS=", "SSL_CERT_FILE=", "SSL_CERT_DIR="); err == nil {
						t.Errorf("without trust: %s", out)
					}
				}
			})
		}
	}
}

func TestTheAuthorityIsGoodForItsDomainsOnly(t *testing.T) {
	f := files(t)
	if _, err := f.Open("sandboxes.example.com"); err != nil {
		t.Fatal(err)
	}
	for _, domain := range []string{"sandboxes.example.com", "e2b.localhost", "a.sandboxes.example.com"} {
		if _, err := tlscert.NewLocal(tlscert.LocalConfig{Files: f, Domain: domain}); err != nil {
			t.Errorf("%s: %v", domain, err)
		}
	}
	for _, domain := range []string{"example.com", "xsandboxes.example.com", "bank.example"} {
		if _, err := tlscert.NewLocal(tlscert.LocalConfig{Files: f, Domain: domain}); err == nil || !strings.Contains(err.Error(), "wrenn ca --new --domain "+domain) {
			t.Errorf("%s: %v", domain, err)
		}
	}
	// Whoever has the key does not get further: clients look at its certificate.
	data, err := os.ReadFile(f.Private)
	if err != nil {
		t.Fatal(err)
	}
	addr, forged := forge(t, data, "bank.example")
	if _, err := handshake(addr, "bank.example", forged); err == nil || !strings.Contains(err.Error(), "not permitted") {
		t.Errorf("a certificate for another domain: %v", err)
	}
	if path, err := exec.LookPath("curl"); err == nil {
		out, err := exec.Command(path, "-sS", "--cacert", f.Public, "--resolve", fmt.Sprintf("bank.example:%d:127.0.0.1", addr.Port), fmt.Sprintf("https://bank.example:%d/", addr.Port)).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "permitted subtree") {
			t.Errorf("curl: %v %s", err, out)
		}
	}
}

func TestCertificatesAreRenewedWhileServing(t *testing.T) {
	t.Parallel()
	const lifetime = 4 * time.Second
	addr, authority := local(t, tlscert.LocalConfig{Files: files(t), Domain: "e2b.localhost", Lifetime: lifetime})
	var last *x509.Certificate
	renewals := 0
	for begin := time.Now(); time.Since(begin) < 2*lifetime; time.Sleep(20 * time.Millisecond) {
		leaf, err := handshake(addr, "api.e2b.localhost", roots(authority))
		if err != nil {
			t.Fatalf("after %s: %v", time.Since(begin), err)
		}
		if left := time.Until(leaf.NotAfter); left < 0 {
			t.Fatalf("serves a certificate that ended %s ago", -left)
		}
		if last != nil && !leaf.Equal(last) {
			renewals++
		}
		last = leaf
	}
	if renewals < 2 || renewals > 6 {
		t.Errorf("%d renewals in %s of certificates that are good for %s", renewals, 2*lifetime, lifetime)
	}
}

func TestAnotherAuthorityIsServedWithoutARestart(t *testing.T) {
	f := files(t)
	addr, first := local(t, tlscert.LocalConfig{Files: f, Domain: "e2b.localhost"})
	second, err := f.Replace()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := handshake(addr, "api.e2b.localhost", roots(second)); err != nil {
		t.Error(err)
	}
	if _, err := handshake(addr, "api.e2b.localhost", roots(first)); err == nil {
		t.Error("still serves what the old one signed")
	}
}

func TestABrokenAuthorityIsNotServedAndNotOverwritten(t *testing.T) {
	f := files(t)
	var logged lockedBuffer
	addr, authority := local(t, tlscert.LocalConfig{Files: f, Domain: "e2b.localhost", Log: logged.logger()})
	good, err := os.ReadFile(f.Private)
	if err != nil {
		t.Fatal(err)
	}
	other := files(t)
	if _, err := other.Open(); err != nil {
		t.Fatal(err)
	}
	foreign, err := os.ReadFile(other.Private)
	if err != nil {
		t.Fatal(err)
	}
	cert, _ := pem.Decode(good)
	_, foreignKey := pem.Decode(foreign)
	for what, data := range map[string][]byte{
		"empty":               {},
		"half":                good[:len(good)/2],
		"without its key":     pem.EncodeToMemory(cert),
		"with another's key":  append(pem.EncodeToMemory(cert), foreignKey...),
		"another kind of PEM": []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
		"no authority":        selfSigned(t),
	} {
		if err := os.WriteFile(f.Private, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Open(); err == nil || !strings.Contains(err.Error(), "wrenn ca --new") {
			t.Errorf("%s: opened: %v", what, err)
		}
		if _, err := tlscert.NewLocal(tlscert.LocalConfig{Files: f, Domain: "e2b.localhost"}); err == nil {
			t.Errorf("%s: served", what)
		}
		if now, err := os.ReadFile(f.Private); err != nil || !bytes.Equal(now, data) {
			t.Errorf("%s: the file was changed: %v", what, err)
		}
		if _, err := handshake(addr, "api.e2b.localhost", roots(authority)); err != nil {
			t.Errorf("%s: a running platform stops serving: %v", what, err)
		}
	}
	os.Remove(f.Private)
	if _, err := handshake(addr, "api.e2b.localhost", roots(authority)); err != nil {
		t.Errorf("gone: a running platform stops serving: %v", err)
	}
	if !strings.Contains(logged.String(), "keeping the old TLS certificate") {
		t.Error("nothing is said")
	}
	if err := os.WriteFile(f.Private, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if again, err := f.Open(); err != nil || !bytes.Equal(again.PEM(), authority.PEM()) {
		t.Errorf("repaired: %v", err)
	}
}

func TestTheKeyIsForRootAloneAndTheCertificateForEverybody(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	f := files(t)
	authority, err := f.Open()
	if err != nil {
		t.Fatal(err)
	}
	mode := func(path string) fs.FileMode {
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Mode().Perm()
	}
	if got := mode(f.Private); got != 0o600 {
		t.Errorf("key: %o", got)
	}
	if got := mode(filepath.Dir(f.Private)); got&0o077 != 0 {
		t.Errorf("its directory: %o", got)
	}
	if got := mode(f.Public); got != 0o644 {
		t.Errorf("certificate: %o", got)
	}
	if data, _ := os.ReadFile(f.Public); bytes.Contains(data, []byte("PRIVATE")) {
		t.Error("the key is in the public file")
	}
	// Somebody meant well, or a backup was restored.
	if err := errors.Join(os.Chmod(f.Private, 0o644), os.Remove(f.Public)); err != nil {
		t.Fatal(err)
	}
	syscall.Umask(0o077)
	again, err := f.Open()
	if err != nil || !bytes.Equal(again.PEM(), authority.PEM()) {
		t.Fatalf("opened again: %v", err)
	}
	if key, cert := mode(f.Private), mode(f.Public); key != 0o600 || cert != 0o644 {
		t.Errorf("opened again: key %o, certificate %o", key, cert)
	}
}

func TestManyWhoOpenItAtOnceGetOneAuthority(t *testing.T) {
	f := files(t)
	const many = 20
	got := make([][]byte, many)
	var opening sync.WaitGroup
	for i := range many {
		opening.Go(func() {
			a, err := f.Open()
			if err != nil {
				t.Error(err)
				return
			}
			got[i] = a.PEM()
		})
	}
	opening.Wait()
	published, err := os.ReadFile(f.Public)
	if err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if !bytes.Equal(got[i], published) {
			t.Errorf("number %d has another authority", i)
		}
	}
}

// A start that was killed while it wrote leaves a file beside the real ones.
func TestWhatAKilledStartLeftIsNoHindrance(t *testing.T) {
	f := files(t)
	if err := os.MkdirAll(filepath.Dir(f.Private), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(f.Private+".tmp", []byte("-----BEGIN CERT"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Open(); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(f.Private); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
}

func TestAnAuthorityThatEndsSoonSignsNothingBeyondItsEnd(t *testing.T) {
	addr, authority := local(t, tlscert.LocalConfig{Files: files(t), Domain: "e2b.localhost", Lifetime: 100 * 365 * 24 * time.Hour})
	leaf, err := handshake(addr, "api.e2b.localhost", roots(authority))
	if err != nil {
		t.Fatal(err)
	}
	if leaf.NotAfter.After(authority.Expires()) {
		t.Errorf("certificate until %s, authority until %s", leaf.NotAfter, authority.Expires())
	}
}

func TestHTTP2IsSpoken(t *testing.T) {
	addr, authority := local(t, tlscert.LocalConfig{Files: files(t), Domain: "e2b.localhost"})
	client := &http.Client{Transport: &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: tlsClient("api.e2b.localhost", roots(authority))}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("https://" + addr.String())
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.ProtoMajor != 2 {
		t.Error(resp.Proto)
	}
}
