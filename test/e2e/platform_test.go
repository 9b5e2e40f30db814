package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// platform is a `wrenn up` with a data directory of its own.
type platform struct {
	t      testing.TB
	dir    string   // data directory
	listen string   // host:port
	flags  []string // of `wrenn up`, beside --data and --listen
	log    string   // file with what it said

	cmd    *exec.Cmd // nil when it does not run
	exited chan struct{}

	url, key string // of its API and data plane
}

// newPlatform makes a data directory, with the shared base template in it, and
// frees everything at the end of the test. It does not start anything.
func newPlatform(t testing.TB, flags ...string) *platform {
	t.Helper()
	if suite.skip != "" {
		t.Skip(suite.skip)
	}
	// Short: the paths of sockets below it have to fit into 108 bytes.
	dir, err := os.MkdirTemp(suite.data, "p")
	if err != nil {
		t.Fatal(err)
	}
	p := &platform{
		t: t, dir: dir, flags: flags, log: dir + ".log",
		listen: fmt.Sprintf("localhost:%d", freePort(t)),
	}
	t.Cleanup(p.destroy)
	if err := os.Symlink(filepath.Dir(filepath.Dir(suite.base.RootFS)), filepath.Join(dir, "templates")); err != nil {
		t.Fatal(err)
	}
	return p
}

// startPlatform starts a platform and waits until it serves.
func startPlatform(t testing.TB, flags ...string) *platform {
	t.Helper()
	p := newPlatform(t, flags...)
	p.start()
	return p
}

// adjustBase gives this platform a base template of its own that differs from
// the shared one in build.json; its root filesystem is rootfs.
func (p *platform) adjustBase(rootfs string, changes map[string]any) {
	p.t.Helper()
	manifest, err := os.ReadFile(filepath.Join(filepath.Dir(suite.base.RootFS), "build.json"))
	if err != nil {
		p.t.Fatal(err)
	}
	var build map[string]any
	if err := json.Unmarshal(manifest, &build); err != nil {
		p.t.Fatal(err)
	}
	maps.Copy(build, changes)
	if manifest, err = json.Marshal(build); err != nil {
		p.t.Fatal(err)
	}
	templates := filepath.Join(p.dir, "templates")
	dir := filepath.Join(templates, suite.base.ID)
	err = errors.Join(
		os.Remove(templates),
		os.MkdirAll(dir, 0o755),
		os.Symlink(rootfs, filepath.Join(dir, "rootfs")),
		os.WriteFile(filepath.Join(dir, "build.json"), manifest, 0o644),
	)
	if err != nil {
		p.t.Fatal(err)
	}
}

// start runs `wrenn up` in a process group of its own, as a shell does, and
// waits until it serves.
func (p *platform) start() {
	p.t.Helper()
	p.startAt("http://" + p.listen)
}

// startAt is start for a platform whose own clients reach it at url.
func (p *platform) startAt(url string) {
	p.t.Helper()
	log, err := os.OpenFile(p.log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(suite.bin, append([]string{"up", "--data", p.dir, "--listen", p.listen}, p.flags...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	exited := make(chan struct{})
	p.cmd, p.exited = cmd, exited
	go func() { defer close(exited); cmd.Wait() }()
	p.url = url
	eventually(p.t, 60*time.Second, "platform serves", func() error {
		select {
		case <-exited:
			p.t.Fatalf("wrenn up ended: %v\n%s", cmd.ProcessState, p.logTail())
		default:
		}
		resp, err := http.Get(p.url + "/health")
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode/100 != 2 {
			return fmt.Errorf("GET /health: %s", resp.Status)
		}
		return p.readCredentials()
	})
}

func (p *platform) readCredentials() error {
	data, err := os.ReadFile(filepath.Join(p.dir, "credentials.json"))
	if err != nil {
		return err
	}
	var c struct {
		APIURL string `json:"api_url"`
		APIKey string `json:"api_key"`
	}
	if err := json.Unmarshal(data, &c); err != nil {
		return err
	}
	if c.APIURL != p.url {
		return fmt.Errorf("credentials.json names %s, not %s", c.APIURL, p.url)
	}
	p.key = c.APIKey
	return nil
}

// end signals the platform and waits until its process has gone.
func (p *platform) end(sig syscall.Signal) {
	p.t.Helper()
	if p.cmd == nil {
		return
	}
	pid := p.cmd.Process.Pid
	if sig == syscall.SIGINT {
		pid = -pid // Ctrl-C reaches the whole foreground group
	}
	if err := syscall.Kill(pid, sig); err != nil {
		p.t.Fatalf("signal platform: %v", err)
	}
	select {
	case <-p.exited:
	case <-time.After(60 * time.Second):
		p.t.Fatalf("platform does not end on %s\n%s", sig, p.logTail())
	}
	p.cmd = nil
}

// destroy ends what is left of the platform, whatever state a test left it in.
func (p *platform) destroy() {
	if p.t.Failed() {
		p.t.Logf("log of the platform:\n%s", p.logTail())
	}
	if p.cmd != nil {
		syscall.Kill(p.cmd.Process.Pid, syscall.SIGTERM)
		select {
		case <-p.exited:
		case <-time.After(30 * time.Second):
			p.t.Errorf("the platform did not end on SIGTERM within 30 s")
			p.cmd.Process.Kill()
			<-p.exited
		}
	}
	out, err := exec.Command(suite.bin, "down", "--data", p.dir).CombinedOutput()
	if err != nil {
		p.t.Errorf("wrenn down: %v\n%s", err, out)
	}
	if left := leftovers(p.t, p.dir); len(left) > 0 {
		p.t.Errorf("left after wrenn down:\n%s", strings.Join(left, "\n"))
		return // keep the directory: it is needed to clean up
	}
	if err := errors.Join(os.RemoveAll(p.dir), os.Remove(p.log)); err != nil && !errors.Is(err, os.ErrNotExist) {
		p.t.Error(err)
	}
}

func (p *platform) logTail() string {
	data, _ := os.ReadFile(p.log)
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(lines[max(0, len(lines)-60):], "\n")
}

// tag is in the names of everything host-wide that belongs to a data directory.
func tag(dir string) string {
	h := fnv.New32a()
	io.WriteString(h, dir)
	return fmt.Sprintf("%04x", h.Sum32()&0xffff)
}

// environ is this process's environment with what names the platform to clients
// in place of anything that named another one.
func (p *platform) environ(more ...string) []string {
	env := slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "E2B_") })
	return append(env, append([]string{"E2B_API_URL=" + p.url, "E2B_SANDBOX_URL=" + p.url, "E2B_API_KEY=" + p.key}, more...)...)
}

// with is the platform for a subtest, whose failures are then its own.
func (p *platform) with(t testing.TB) *platform {
	c := *p
	c.t = t
	return &c
}

// api makes a call of the control API and returns status and body.
func (p *platform) api(method, path string, body any) (int, []byte) {
	p.t.Helper()
	status, answer, err := p.request(method, path, body)
	if err != nil {
		p.t.Fatal(err)
	}
	return status, answer
}

// request is api for goroutines that must not end the test. A body that is a
// string is sent as it is, anything else as JSON.
func (p *platform) request(method, path string, body any) (int, []byte, error) {
	var r io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		r = strings.NewReader(b)
	default:
		encoded, err := json.Marshal(b)
		if err != nil {
			return 0, nil, err
		}
		r = bytes.NewReader(encoded)
	}
	req, err := http.NewRequest(method, p.url+path, r)
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("X-API-Key", p.key)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	return resp.StatusCode, answer, err
}

// running returns the ids of the sandboxes that the API lists.
func (p *platform) running() []string {
	p.t.Helper()
	status, body := p.api("GET", "/v2/sandboxes?limit=100", nil)
	var list []struct {
		SandboxID string `json:"sandboxID"`
	}
	if status != 200 || json.Unmarshal(body, &list) != nil {
		p.t.Fatalf("list sandboxes: %d %s", status, body)
	}
	ids := []string{}
	for _, s := range list {
		ids = append(ids, s.SandboxID)
	}
	slices.Sort(ids)
	return ids
}

func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
