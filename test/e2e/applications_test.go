package e2e

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// web is a platform that serves the ports of sandboxes in every form.
type web struct {
	*platform
	tlsPort     string
	certificate string // PEM file with what it serves over TLS
	roots       *x509.CertPool
}

const webDomain = "apps.localhost"

// startWeb starts one whose sandboxes have rootfs and the memory that development
// servers want.
func startWeb(t *testing.T, rootfs string) *web {
	t.Helper()
	dir := t.TempDir()
	authority, err := writeCertificates(dir, webDomain, "*."+webDomain)
	if err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(authority)
	if err != nil {
		t.Fatal(err)
	}
	w := &web{
		tlsPort: fmt.Sprint(freePort(t)), certificate: filepath.Join(dir, "leaf.pem"), roots: x509.NewCertPool(),
	}
	w.roots.AppendCertsFromPEM(pem)
	w.platform = newPlatform(t, "--domain", webDomain+":"+w.tlsPort, "--tls-listen", "localhost:"+w.tlsPort,
		"--tls-cert", w.certificate, "--tls-key", filepath.Join(dir, "leaf.key"))
	w.adjustBase(rootfs, map[string]any{"memoryMiB": 2048})
	w.start()
	return w
}

// form is one of the ways in which a client reaches a port of a sandbox.
type form struct {
	name string
	url  string // of the application's root, with a slash at the end
}

func (w *web) forms(b *box, port int) []form {
	_, plainPort, _ := net.SplitHostPort(w.listen)
	host := fmt.Sprintf("%d-%s.%s", port, b.id, webDomain)
	return []form{
		{"host", "http://" + host + ":" + plainPort + "/"},
		{"host over TLS", "https://" + host + ":" + w.tlsPort + "/"},
		{"path", fmt.Sprintf("%s/proxy/%s/%d/", w.url, b.id, port)},
	}
}

// client returns one that knows names below .localhost and the platform's
// certificate. It speaks HTTP/2 over TLS, or HTTP/1.1 alone, which a client of
// WebSockets needs.
func (w *web) client(t *testing.T, http2 bool) *http.Client {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(http2)
	transport := &http.Transport{
		DialContext: dialLoopback, Protocols: &protocols, TLSClientConfig: &tls.Config{RootCAs: w.roots},
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// dialLoopback is for names below .localhost, which not every resolver knows.
func dialLoopback(ctx context.Context, network, addr string) (net.Conn, error) {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	return new(net.Dialer).DialContext(ctx, network, net.JoinHostPort("127.0.0.1", port))
}

// serve starts a server in the sandbox and waits until it answers at path. What it
// has logged is told when the test fails.
func (w *web) serve(t *testing.T, b *box, port int, path, script string) *session {
	t.Helper()
	server := b.background(script, false)
	t.Cleanup(func() {
		if t.Failed() {
			log := server.output()
			t.Logf("what the server on port %d logged:\n%s", port, log[max(0, len(log)-8<<10):])
		}
	})
	client := w.client(t, false)
	client.Timeout = 10 * time.Second
	eventually(t, 90*time.Second, fmt.Sprintf("port %d answers", port), func() error {
		select {
		case err := <-server.ended:
			t.Fatalf("the server on port %d ended: %v", port, err)
		default:
		}
		res, err := client.Get(w.forms(b, port)[0].url + path)
		if err != nil {
			return err
		}
		res.Body.Close()
		if res.StatusCode >= 500 {
			return errors.New(res.Status)
		}
		return nil
	})
	return server
}

// upload puts a file of testdata into the sandbox's home.
func (w *web) upload(t *testing.T, b *box, name string) {
	t.Helper()
	if r := w.tryWrenn("", "sandbox", "cp", filepath.Join("testdata", name), b.id+":"); r.exit != 0 {
		t.Fatalf("upload %s: %s", name, r)
	}
}

// application is a program of others that is installed from the public registries
// inside a sandbox: testdata/applications/{name} becomes /home/user/{name}, and
// there the default user runs install.
type application struct{ name, install string }

// rootfs returns the base template's root filesystem with the application in it.
// It is made once for what the application consists of, and kept: installing
// takes a minute.
func (a application) rootfs(t *testing.T) string {
	t.Helper()
	if suite.skip != "" {
		t.Skip(suite.skip)
	}
	defer lockCache(t)()
	all := filepath.Join(suite.cache, "applications")
	dir := filepath.Join(all, a.name+"-"+a.version(t))
	rootfs := filepath.Join(dir, "rootfs")
	if _, err := os.Stat(rootfs); err == nil {
		return rootfs
	}
	begin := time.Now()
	w := startWeb(t, suite.base.RootFS)
	b := w.create(map[string]any{"timeout": 1800})
	w.upload(t, b, filepath.Join("applications", a.name))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	install := fmt.Sprintf("cd %s && %s", a.name, a.install)
	cmd := exec.CommandContext(ctx, suite.bin, "sandbox", "exec", b.id, "--", "bash", "-lc", install)
	cmd.Env = w.environ("WRENN_DATA=" + w.dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		if unreachable.Match(out) {
			t.Skipf("sandboxes do not reach the package registry here:\n%s", out)
		}
		t.Fatalf("install %s in a sandbox: %v\n%s", a.name, err, out)
	}
	old, _ := filepath.Glob(filepath.Join(all, a.name+"-*"))
	for _, path := range old {
		os.RemoveAll(path)
	}
	// Hard links will do, as nobody writes to root filesystems, but not from disk to disk.
	assemble := exec.CommandContext(ctx, "bash", "-euc", `set -o pipefail
mkdir -p "$2.new"
cp -al "$1" "$2.new/rootfs" 2>/dev/null || { rm -rf "$2.new/rootfs"; cp -a "$1" "$2.new/rootfs"; }
mkdir "$2.new/rootfs/home/user/$3"
"$4" sandbox cp "$5:$3" - | tar -x --numeric-owner -C "$2.new/rootfs/home/user/$3"
mv "$2.new" "$2"`, "bash", suite.base.RootFS, dir, a.name, suite.bin, b.id)
	assemble.Env = cmd.Env
	if out, err := assemble.CombinedOutput(); err != nil {
		t.Fatalf("keep %s: %v\n%s", a.name, err, out)
	}
	b.kill()
	t.Logf("installed %s in %s", a.name, time.Since(begin).Round(time.Second))
	return rootfs
}

// version tells states of the application and the base template apart.
func (a application) version(t *testing.T) string {
	t.Helper()
	sum := sha256.New()
	fmt.Fprintln(sum, suite.base.ID, a.install)
	source := os.DirFS(filepath.Join("testdata", "applications", a.name))
	err := fs.WalkDir(source, ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := fs.ReadFile(source, path)
		fmt.Fprintln(sum, path, len(data))
		sum.Write(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sum.Sum(nil)[:8])
}

// asUser is a script that runs another one as the default user, in a login shell in dir
// below its home.
func asUser(dir, script string) string {
	return fmt.Sprintf("exec su - user -c 'cd %s && exec %s'", dir, strings.ReplaceAll(script, "'", `'\''`))
}
