package runtimetest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Where testguest listens.
const (
	guestPort = 8080
	sidePort  = 8081 // a child of init
	echoPort  = 8082 // lines come back
)

// buildGuest builds testguest into dir and returns its path.
func buildGuest(t *testing.T, dir string) string {
	path := filepath.Join(dir, "testguest")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", path, "github.com/wrenn/wrenn/internal/runtime/runtimetest/testguest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build test guest: %v\n%s", err, out)
	}
	return path
}

// makeRootFS makes the least that a guest needs, below dir.
func makeRootFS(t *testing.T, dir string) string {
	root := filepath.Join(dir, "rootfs")
	for _, d := range []string{"dev", "etc", "proc", "sys", "tmp", "usr/bin", "etc/lower", "etc/lower2"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{
		runtime.GuestInitPath: "", "/etc/os-release": "ID=template\n", "/etc/hosts": "the template's\n",
		"/etc/unwanted": "", "/etc/old": "old\n", "/etc/lower/inside": "", "/etc/lower2/inside": "",
	} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// guest is a running instance and the way to talk to it.
type guest struct {
	runtime.Instance
	cfg    runtime.Config
	client *http.Client
}

// config is what the suite makes instances from unless a test changes it.
func (s *suite) config(t *testing.T) runtime.Config {
	return runtime.Config{
		ID: sandbox.NewID(), RootFS: s.rootfs, Dir: t.TempDir(), GuestInit: s.init, InitArgs: []string{"hello"},
		Slot: s.Slot(t), Hostname: "guesthost",
		Resources: sandbox.Resources{CPUs: 1, MemoryMiB: 256, DiskMiB: 64, PIDs: 2048},
	}
}

// start creates an instance and waits until its guest answers.
func (s *suite) start(t *testing.T, change ...func(*runtime.Config)) *guest {
	t.Helper()
	cfg := s.config(t)
	for _, f := range change {
		f(&cfg)
	}
	inst, err := s.Runtime.Create(t.Context(), cfg)
	return s.started(t, cfg, inst, err)
}

// restore makes another instance of an image.
func (s *suite) restore(t *testing.T, image runtime.Image, change ...func(*runtime.Config)) *guest {
	t.Helper()
	cfg := s.config(t)
	for _, f := range change {
		f(&cfg)
	}
	inst, err := s.Runtime.Restore(t.Context(), cfg, image)
	g := s.started(t, cfg, inst, err)
	g.resumed(t, image)
	return g
}

// resumed tells the guest that it goes on elsewhere, as the host agent does: a guest
// with a kernel of its own then sees to its name and its connections itself.
func (g *guest) resumed(t *testing.T, image runtime.Image) {
	t.Helper()
	if image.Kind == runtime.ImageMemory {
		g.must(t, "POST", "/resumed", url.Values{"hostname": {g.cfg.Hostname}}, "")
	}
}

// started waits until the guest of a new instance answers, and sees to its end.
func (s *suite) started(t *testing.T, cfg runtime.Config, inst runtime.Instance, err error) *guest {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{Instance: inst, cfg: cfg, client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
	t.Cleanup(func() {
		if err := inst.Stop(context.Background()); err != nil {
			t.Error(err)
		}
		s.checkNothingLeft(t, cfg)
	})
	g.awaitAnswer(t)
	return g
}

// awaitAnswer asks until the guest listens. A refused connection is the only
// sign of a listener that is not there yet, so it is asked again.
func (g *guest) awaitAnswer(t *testing.T) {
	t.Helper()
	// An emulated machine on a busy host takes a while to boot.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		if _, err := g.call(ctx, "GET", "/ping", nil, ""); err == nil {
			return
		} else if ctx.Err() != nil {
			t.Fatalf("guest does not answer: %v", err)
		}
		select {
		case <-g.Done():
			t.Fatalf("guest ended: %+v", g.Exit())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// call sends one request; an answer other than 200 is an error with its text.
// It breaks off at the end of the instance, because a guest that is gone closes
// no connection.
func (g *guest) call(ctx context.Context, method, path string, query url.Values, body string) (string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-g.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	u := fmt.Sprintf("http://%s%s?%s", g.addr(guestPort), path, query.Encode())
	req, err := http.NewRequestWithContext(ctx, method, u, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	resp, err := g.client.Do(req)
	if err != nil {
		select {
		case <-g.Done():
			err = fmt.Errorf("%w (the instance has ended: %+v)", err, g.Exit())
		default:
		}
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(strings.TrimSpace(string(text)))
	}
	return string(text), err
}

// addr is where the host reaches a port of the guest's.
func (g *guest) addr(port uint16) string {
	return netip.AddrPortFrom(g.cfg.Slot.HostAddr, port).String()
}

func (g *guest) must(t *testing.T, method, path string, query url.Values, body string) string {
	t.Helper()
	text, err := g.call(t.Context(), method, path, query, body)
	if err != nil {
		t.Fatalf("%s %s %v: %v", method, path, query, err)
	}
	return text
}

func (g *guest) read(t *testing.T, path string) string {
	t.Helper()
	return g.must(t, "GET", "/read", url.Values{"path": {path}}, "")
}

func (g *guest) write(ctx context.Context, path string, mib int, body string) error {
	_, err := g.call(ctx, "POST", "/write", url.Values{"path": {path}, "mib": {strconv.Itoa(mib)}}, body)
	return err
}

func (g *guest) number(t *testing.T, path string) int {
	t.Helper()
	text := g.must(t, "GET", path, nil, "")
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s answers %q", path, text)
	}
	return n
}

// count asks the guest's child process how often it was asked.
func (g *guest) count(t *testing.T) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, "GET", "http://"+g.addr(sidePort), nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := g.client.Do(req)
		if err != nil {
			if ctx.Err() != nil {
				t.Fatalf("child process does not answer: %v", err)
			}
			<-time.After(2 * time.Millisecond) // a refused connection is the only sign that it does not listen yet
			continue
		}
		text, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		n, aerr := strconv.Atoi(string(text))
		if err != nil || aerr != nil {
			t.Fatalf("child process answers %q, %v", text, err)
		}
		return n
	}
}

// echo is a connection to the guest's echo server.
type echo struct {
	net.Conn
	lines *bufio.Reader
}

func (g *guest) dialEcho(t *testing.T) *echo {
	t.Helper()
	c, err := new(net.Dialer).DialContext(t.Context(), "tcp", g.addr(echoPort))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	e := &echo{c, bufio.NewReader(c)}
	e.check(t, "first words")
	return e
}

// check sends a line and wants it back.
func (e *echo) check(t *testing.T, line string) {
	t.Helper()
	if err := e.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(e, line)
	if got, err := e.lines.ReadString('\n'); err != nil || got != line+"\n" {
		t.Fatalf("echo of %q is %q, %v", line, got, err)
	}
}

// snapshot takes an image of the guest.
func (g *guest) snapshot(t *testing.T, kind runtime.ImageKind, pause bool) runtime.Image {
	t.Helper()
	image := runtime.Image{Dir: t.TempDir(), Kind: kind}
	if kind == runtime.ImageFiles {
		g.must(t, "POST", "/sync", nil, "")
	}
	begin := time.Now()
	if err := g.Snapshot(t.Context(), image, pause); err != nil {
		t.Fatal(err)
	}
	t.Logf("snapshot of %s took %v", kind, time.Since(begin))
	return image
}

// awaitEnd waits until the instance has ended by itself.
func awaitEnd(t *testing.T, inst runtime.Instance, within time.Duration) runtime.Exit {
	t.Helper()
	select {
	case <-inst.Done():
		return inst.Exit()
	case <-time.After(within):
		t.Fatalf("instance has not ended within %v", within)
		return runtime.Exit{}
	}
}
