package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime/gvisor"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
)

// do is a call of the API on the sandbox that must have that status.
func (b *box) do(method, path string, body any, status int) []byte {
	b.p.t.Helper()
	got, answer := b.p.api(method, "/sandboxes/"+b.id+path, body)
	if got != status {
		b.p.t.Fatalf("%s %s: %d %s, want %d\n%s", method, path, got, answer, status, b.p.logTail())
	}
	return answer
}

func (b *box) pause() { b.p.t.Helper(); b.do("POST", "/pause", nil, 204) }

func (b *box) resume() {
	b.p.t.Helper()
	b.do("POST", "/connect", map[string]any{"timeout": 300}, 201)
}

func (b *box) state() string {
	b.p.t.Helper()
	var s struct{ State string }
	if err := json.Unmarshal(b.do("GET", "", nil, 200), &s); err != nil {
		b.p.t.Fatal(err)
	}
	return s.State
}

// counter starts a program that holds a number in its memory alone and tells it,
// one higher each time, on a port.
func (b *box) counter(port int) {
	b.p.t.Helper()
	script := `
import http.server
n = 0
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global n
        n += 1
        text = str(n).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(text))); self.end_headers(); self.wfile.write(text)
    def log_message(self, *a): pass
class S(http.server.ThreadingHTTPServer): request_queue_size = 200 # connections that it lets wait; its own is 5
S(("127.0.0.1", %d), H).serve_forever()
`
	b.background("exec python3 -c '"+strings.ReplaceAll(fmt.Sprintf(script, port), "'", `'"'"'`)+"'", false)
	eventually(b.p.t, 20*time.Second, "the counter serves", func() error {
		if status, body := b.fetch(port, "/"); status != 200 {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
}

func (b *box) count(port int) int {
	b.p.t.Helper()
	status, body := b.fetch(port, "/")
	n, err := strconv.Atoi(body)
	if status != 200 || err != nil {
		b.p.t.Fatalf("counter: %d %q", status, body)
	}
	return n
}

func TestAPausedSandboxSurvivesAReboot(t *testing.T) { pausedSurvivesReboot(t, startPlatform(t)) }

// A host that boots again has no process, no namespace and no cgroup of before.
func pausedSurvivesReboot(t *testing.T, p *platform) {
	b := p.create(nil)
	b.counter(8000)
	shell := b.background("exec bash --norc", true)
	shell.types("X=in-memory; echo it is$((1))up\n")
	eventually(t, 10*time.Second, "the shell is up", func() error {
		if !strings.Contains(shell.output(), "it is1up") {
			return fmt.Errorf("%q", shell.output())
		}
		return nil
	})
	b.run("mkdir /root/d && printf kept > /root/d/f && chmod 640 /root/d/f && chown user:user /root/d/f && mkfifo /root/pipe && echo shm > /dev/shm/f")
	before := b.count(8000)
	files := `stat -c '%A %U %s' /root/d/f; cat /root/d/f /dev/shm/f; ls -l /root/pipe | cut -c1`
	want := b.run(files)
	b.pause()
	if got := b.state(); got != "paused" {
		t.Errorf("it is %s", got)
	}

	p.end(syscall.SIGKILL)
	tag := tag(p.dir)
	if err := gvisor.RemoveAll(filepath.Join(p.dir, "agent", "runsc"), tag); err != nil {
		t.Fatal(err)
	}
	if err := network.RemoveAll(t.Context(), tag); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(p.dir, "agent", "runsc")); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(microvm.RemoveAll(tag), disk.Unmount(filepath.Join(p.dir, "agent"), filepath.Join(p.dir, "disks.xfs"))); err != nil {
		t.Fatal(err)
	}
	p.start()
	if got := b.state(); got != "paused" {
		t.Errorf("after a reboot it is %s", got)
	}
	b.resume()
	if got := b.count(8000); got != before+1 {
		t.Errorf("the counter went from %d to %d", before, got)
	}
	if got := b.run(files); got != want {
		t.Errorf("files are\n%s, were\n%s", got, want)
	}
	// The terminal goes on: somebody connects to it anew and types.
	again := b.attach(shell.pid)
	again.types("echo still $X\n")
	eventually(t, 10*time.Second, "the shell answers", func() error {
		if !strings.Contains(again.output(), "still in-memory") {
			return fmt.Errorf("%q", again.output())
		}
		return nil
	})
	if skew := clockSkew(t, b); skew < -2*time.Second || skew > 2*time.Second {
		t.Errorf("its clock is off by %v", skew)
	}
}

func clockSkew(t *testing.T, b *box) time.Duration {
	t.Helper()
	seconds, err := strconv.ParseFloat(strings.TrimSpace(b.run("date +%s.%N")), 64)
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(seconds*1e9) - time.Duration(time.Now().UnixNano())
}

func TestPausedSandboxesSurviveWrennDown(t *testing.T) {
	p := startPlatform(t)
	paused, running := p.create(nil), p.create(nil)
	paused.counter(8000)
	before := paused.count(8000)
	paused.pause()
	p.end(syscall.SIGINT) // ends what runs
	out, err := p.command("down").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if left := leftovers(t, p.dir); len(left) > 0 {
		t.Errorf("left after wrenn down:\n%s", strings.Join(left, "\n"))
	}
	p.start()
	if status, body := p.api("GET", "/sandboxes/"+running.id, nil); status != 404 {
		t.Errorf("the one that ran: %d %s", status, body)
	}
	paused.resume()
	if got := paused.count(8000); got != before+1 {
		t.Errorf("the counter went from %d to %d", before, got)
	}
}

func TestAHundredRequestsAtOnceWakeASandboxAndAreAnswered(t *testing.T) {
	p := startPlatform(t)
	b := p.create(map[string]any{"timeout": 5, "autoPause": true, "autoResume": map[string]any{"enabled": true}})
	b.counter(8000)
	eventually(t, 20*time.Second, "it is paused at the end of its time", func() error {
		if s := b.state(); s != "paused" {
			return fmt.Errorf("it is %s", s)
		}
		return nil
	})
	seen := make([]bool, 1000)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			status, body := b.fetch(8000, "/")
			n, _ := strconv.Atoi(body)
			mu.Lock()
			defer mu.Unlock()
			if status != 200 || n < 1 || seen[n] {
				t.Errorf("%d %s", status, body)
				return
			}
			seen[n] = true
		})
	}
	wg.Wait()
	var events []struct{ From, State, Cause string }
	if err := json.Unmarshal(b.do("GET", "/events", nil, 200), &events); err != nil {
		t.Fatal(err)
	}
	resumes := 0
	for _, e := range events {
		if e.From == "paused" && e.State == "resuming" {
			resumes++
		}
	}
	if resumes != 1 {
		t.Errorf("resumed %d times: %+v", resumes, events)
	}
}

func TestConnectionsOfBeforeAPauseAreOver(t *testing.T) {
	connectionsOfBeforeAreOver(t, startPlatform(t))
}

func connectionsOfBeforeAreOver(t *testing.T, p *platform) {
	b := p.create(nil)
	b.run("nohup python3 -c '" + `
import socket, threading
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("0.0.0.0", 7000)); s.listen()
def serve(c):
    try:
        while True:
            d = c.recv(100)
            if not d: break
            c.sendall(d)
        how = "closed"
    except OSError as e: how = "error"
    open("/root/ended", "a").write(how + "\n")
while True:
    c, _ = s.accept(); threading.Thread(target=serve, args=(c,)).start()
` + "' >/dev/null 2>&1 &")
	dial := func() (conn net.Conn) {
		eventually(t, 10*time.Second, "the echo answers", func() (err error) {
			if conn, err = b.tunnel(7000); err != nil {
				return err
			}
			t.Cleanup(func() { conn.Close() })
			return echo(conn)
		})
		return conn
	}
	conn := dial()
	// A snapshot cuts nothing.
	b.do("POST", "/snapshots", map[string]any{}, 201)
	if err := echo(conn); err != nil {
		t.Errorf("after a snapshot: %v", err)
	}
	b.pause()
	if err := echo(conn); err == nil {
		t.Error("a connection goes on to a paused sandbox")
	}
	b.resume()
	eventually(t, 5*time.Second, "the application learns that its connection is over", func() error {
		if r := b.try("cat /root/ended"); r.exit != 0 {
			return fmt.Errorf("%s", r)
		}
		return nil
	})
	dial() // it takes new ones
}

// tunnel opens a connection to a port by CONNECT.
func (b *box) tunnel(port int) (net.Conn, error) {
	addr := strings.TrimPrefix(b.p.url, "http://")
	conn, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return nil, err
	}
	host := fmt.Sprintf("%d-%s.wrenn.localhost:%d", port, b.id, port)
	if _, err := fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", host, host); err != nil {
		conn.Close()
		return nil, err
	}
	head := make([]byte, 0, 200)
	for one := make([]byte, 1); !strings.HasSuffix(string(head), "\r\n\r\n"); head = append(head, one[0]) {
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Read(one); err != nil {
			conn.Close()
			return nil, err
		}
	}
	if !strings.HasPrefix(string(head), "HTTP/1.1 200 ") {
		conn.Close()
		return nil, fmt.Errorf("%q", head)
	}
	return conn, nil
}

func echo(conn net.Conn) error {
	conn.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err := conn.Write([]byte("hello")); err != nil {
		return err
	}
	buf := make([]byte, 5)
	if _, err := conn.Read(buf); err != nil {
		return err
	}
	if string(buf) != "hello" {
		return fmt.Errorf("got %q", buf)
	}
	return nil
}

func TestForksGoOnEachByItself(t *testing.T) { forksGoOn(t, startPlatform(t)) }

func forksGoOn(t *testing.T, p *platform) {
	b := p.create(map[string]any{"envVars": map[string]string{"COLOUR": "red"}})
	b.counter(8000)
	before := b.count(8000)
	var forks []struct {
		Sandbox struct {
			SandboxID       string `json:"sandboxID"`
			EnvdAccessToken string `json:"envdAccessToken"`
		}
		Error any
	}
	if err := json.Unmarshal(b.do("POST", "/fork", map[string]any{"count": 4, "timeout": 100}, 201), &forks); err != nil || len(forks) != 4 {
		t.Fatalf("%d forks, %v", len(forks), err)
	}
	random := map[string]bool{}
	for _, f := range forks {
		if f.Error != nil {
			t.Fatalf("%+v", f)
		}
		child := p.box(f.Sandbox.SandboxID, f.Sandbox.EnvdAccessToken)
		if got := child.count(8000); got != before+1 {
			t.Errorf("the counter of a fork went from %d to %d", before, got)
		}
		got := child.run("echo $COLOUR $E2B_SANDBOX_ID $(hostname)")
		if want := fmt.Sprintf("red %s %s\n", child.id, child.id); got != want {
			t.Errorf("a fork says %q, want %q", got, want)
		}
		random[child.run("head -c 16 /dev/urandom | od -An -tx1")] = true
		if r := p.box(child.id, b.token).try("true"); r.err == nil {
			t.Error("the source's token opens a fork")
		}
	}
	if len(random) != len(forks) {
		t.Errorf("forks draw the same random numbers: %v", random)
	}
	if got := b.count(8000); got != before+1 {
		t.Errorf("the counter of the source went from %d to %d", before, got)
	}
}

func TestSandboxesOfTheWarmPoolAreAsAnyOther(t *testing.T) {
	p := startPlatform(t)
	eventually(t, 30*time.Second, "one waits", func() error {
		if n := value(p.scrape()["wrenn_pool_ready"]); n < 1 {
			return fmt.Errorf("%v wait", n)
		}
		return nil
	})
	b := p.create(map[string]any{"envVars": map[string]string{"COLOUR": "red"}})
	if got := b.run("echo $COLOUR $E2B_SANDBOX_ID $(hostname) $(whoami)"); got != fmt.Sprintf("red %s %s root\n", b.id, b.id) {
		t.Errorf("it says %q", got)
	}
	m := p.scrape()
	if hits, starts := value(m["wrenn_pool_hits_total"]), value(m["wrenn_sandbox_starts_total"], "from", "pool"); hits != 1 || starts != 1 {
		t.Errorf("%v hits, %v starts from the pool", hits, starts)
	}
	// A platform that is killed leaves what waited, and the next one frees it.
	p.end(syscall.SIGKILL)
	p.start()
	if got := b.run("echo here"); got != "here\n" {
		t.Errorf("after a kill: %q", got)
	}
}

func TestEventsAreKeptWhenTheSandboxIsGone(t *testing.T) {
	p := startPlatform(t)
	b := p.create(nil)
	b.pause()
	b.resume()
	b.kill()
	out, err := p.command("sandbox", "events", b.id).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{"paused by request", "resumed by request", "it was killed", "stopped"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("events say nothing of %q:\n%s", want, out)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", p.url+"/sandboxes/"+b.id+"/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 401 {
		t.Errorf("without a key: %s", resp.Status)
	}
}
