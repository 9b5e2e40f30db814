package template

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestBaseTemplate builds the base template twice, with an authority of the
// test's own among the host's, and looks at what came out. It takes minutes and
// the network: `make test-reproducible`.
func TestBaseTemplate(t *testing.T) {
	if os.Getenv("WRENN_TEST_REPRODUCIBLE") == "" {
		t.Skip("builds the base template twice, which takes minutes: make test-reproducible")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: it builds a whole system")
	}
	ca := newAuthority(t)
	caDir := t.TempDir()
	if err := os.WriteFile(filepath.Join(caDir, "company.crt"), ca.pem, 0o644); err != nil {
		t.Fatal(err)
	}
	r, err := baseRecipe(true, caDir)
	if err != nil {
		t.Fatal(err)
	}
	var builds [2]Build
	for i := range builds {
		var out bytes.Buffer
		builds[i], err = ensure(t.Context(), Config{Dir: t.TempDir(), Progress: &out}, r, build)
		if err != nil {
			t.Fatalf("build %d: %v\n%s", i, err, out.String())
		}
		t.Log(out.String())
		if !strings.Contains(out.String(), "packages unpacked") {
			t.Errorf("the progress shows no packages:\n%s", out.String())
		}
	}
	first, second := builds[0], builds[1]
	if first.Digest != second.Digest {
		t.Errorf("two builds differ: %s and %s\n%s", first.Digest, second.Digest, difference(t, first.RootFS, second.RootFS))
	}
	if err := Verify(t.Context(), first); err != nil {
		t.Error(err)
	}
	if text, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(text), filepath.Dir(first.RootFS)) {
		t.Errorf("the build left mounts on the host (%v):\n%s", err, text)
	}

	address := serveTLS(t, ca)
	// The tests below write: they have the second build to themselves.
	for _, tt := range []struct{ name, command, want string }{
		{"the user", "id -u; id -g; pwd; echo $SHELL; stat -c '%a %U' /home/user", "1000\n1000\n/home/user\n/bin/bash\n755 user"},
		{"sudo without a password", "sudo -n id -u", "0"},
		{"python", "python -c 'print(6*7)' && python3 -c 'print(6*7)'", "42\n42"},
		{"pip into the system", "pip install --no-index --find-links /nowhere pip | tail -1", "Requirement already satisfied: pip in /usr/lib/python3/dist-packages (23.0.1)"},
		{"a virtual environment", "python -m venv /tmp/v && /tmp/v/bin/pip --version | cut -d' ' -f1", "pip"},
		{"node and npm", "node -p 6*7 && npm -v >/dev/null && echo npm", "42\nnpm"},
		{"npm's global directory", "npm config get prefix && test -w /usr/local/bin && echo writable", "/usr/local\nwritable"},
		{"git with its daemon", "git init -q /tmp/r && git daemon --help >/dev/null 2>&1; test -x /usr/lib/git-core/git-daemon && echo daemon", "daemon"},
		{"tools", "for t in curl wget ps ip less unzip xz file nano vi nc jq rg ssh rsync; do command -v $t >/dev/null || echo no $t; done", ""},
		{"the locale", "locale | head -1", "LANG=C.UTF-8"},
		{"its own host name resolves", "getent hosts $(hostname) >/dev/null && echo yes", "yes"},
		{"curl trusts the authority", "curl -s " + address, "trusted"},
		{"curl does without the environment", "env -i curl -s " + address, "trusted"},
		{"git trusts it", "git ls-remote " + address + " 2>&1 | grep -ci certificate", "0"},
		{"python trusts it", "env -i python3 -c \"import urllib.request as u; print(u.urlopen('" + address + "').read().decode())\"", "trusted"},
		{"pip trusts it", "pip download --no-cache-dir -d /tmp/d " + address + "/x.tar.gz 2>&1 | grep -ciE 'certificate|ssl'", "0"},
		{"node trusts it", "env -i /usr/bin/node -e \"require('https').get('" + address + "', r => r.pipe(process.stdout))\"", "trusted"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := inImage(t, second.RootFS, tt.command); got != tt.want {
				t.Errorf("%s\ngot  %q\nwant %q", tt.command, got, tt.want)
			}
		})
	}
}

// inImage runs a command as the image's user in a login shell.
func inImage(t *testing.T, root, command string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c",
		`mount -t proc proc /proc && mount -t devtmpfs dev /dev && cd / && exec su - user -c "$1"`, "sh", command)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS, Unshareflags: syscall.CLONE_NEWNS}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Logf("%s: %v, stderr %q", command, err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

// difference lists what two trees do not have in common.
func difference(t *testing.T, a, b string) string {
	t.Helper()
	out, _ := exec.CommandContext(t.Context(), "diff", "-rq", "--no-dereference", a, b).CombinedOutput()
	return string(out)
}

type authority struct {
	pem  []byte
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Company"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return authority{pem: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), cert: cert, key: key}
}

// serveTLS answers "trusted" under a certificate of ca and returns its address.
func serveTLS(t *testing.T, ca authority) string {
	t.Helper()
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "server"}, DNSNames: []string{"localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: ca.cert.NotBefore, NotAfter: ca.cert.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "trusted") }))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL
}
