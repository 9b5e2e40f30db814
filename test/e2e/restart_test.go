package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// lived is a sandbox with everything in it that has to outlive a platform.
type lived struct {
	*box
	command, terminal *session
}

// live starts a sandbox with a process, a terminal with state, and a file.
func live(p *platform) lived {
	p.t.Helper()
	b := p.create(map[string]any{"metadata": map[string]string{"kept": "yes"}})
	b.run("echo kept > /root/file")
	l := lived{
		box:      b,
		command:  b.background("echo running as $$; exec sleep 1000", false),
		terminal: b.background("", true),
	}
	l.command.says("running as")
	l.terminal.types("STATE=kept-$((6*7)); echo set $STATE\n")
	l.terminal.says("set kept-42")
	return l
}

// verify checks that a sandbox is as live left it, after its platform has been
// started again.
func (l lived) verify(t *testing.T) {
	t.Helper()
	if got := l.run("cat /root/file"); got != "kept\n" {
		t.Errorf("the file has %q", got)
	}
	if got := l.run(fmt.Sprintf("tr '\\0' ' ' < /proc/%d/cmdline", l.command.pid)); got != "sleep 1000 " {
		t.Errorf("process %d is %q", l.command.pid, got)
	}
	again := l.attach(l.terminal.pid)
	again.types("echo still $STATE\n")
	again.says("still kept-42")
	l.background("exec python3 -m http.server 8000 -d /root", false)
	eventually(t, 15*time.Second, "data plane reaches a port of "+l.id, func() error {
		status, body := l.fetch(8000, "/file")
		if status != 200 || body != "kept\n" {
			return fmt.Errorf("%d %q", status, body)
		}
		return nil
	})
	eventually(t, 30*time.Second, "metrics of "+l.id, func() error {
		status, body := l.p.api("GET", "/sandboxes/"+l.id+"/metrics", nil)
		var points []map[string]any
		if status != 200 || json.Unmarshal(body, &points) != nil || len(points) == 0 {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
	if status, body := l.p.api("GET", "/v2/sandboxes/"+l.id+"/logs", nil); status != 200 {
		t.Errorf("logs: %d %s", status, body)
	}
	status, body := l.p.api("GET", "/sandboxes/"+l.id, nil)
	if status != 200 || !strings.Contains(string(body), `"kept":"yes"`) {
		t.Errorf("get sandbox: %d %s", status, body)
	}
}

func TestSandboxesOutliveAKilledPlatform(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	one, two := live(p), live(p)
	before := p.running()

	p.end(syscall.SIGKILL)
	if err := one.command.end(10 * time.Second); err == nil {
		t.Error("the stream of a process ended as if the process had")
	}
	p.start()

	if after := p.running(); !slices.Equal(before, after) {
		t.Fatalf("listed before: %v, after: %v", before, after)
	}
	one.verify(t)
	two.verify(t)
	fresh := p.create(nil)
	if got := fresh.run("echo fresh"); got != "fresh\n" {
		t.Errorf("a new sandbox says %q", got)
	}
	for _, b := range []*box{one.box, two.box, fresh} {
		b.kill()
		if left := leftoversOf(t, b); len(left) > 0 {
			t.Errorf("left of %s after kill:\n%s", b.id, strings.Join(left, "\n"))
		}
	}
	p.end(syscall.SIGINT)
	if left := leftovers(t, p.dir); len(left) > 0 {
		t.Errorf("left after Ctrl-C:\n%s", strings.Join(left, "\n"))
	}
}

func TestSandboxesOutliveAPlatformKilledAgainAndAgain(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	l := live(p)
	for range 3 {
		p.end(syscall.SIGKILL)
		p.start()
		if got := l.run("cat /root/file"); got != "kept\n" {
			t.Fatalf("the file has %q", got)
		}
	}
	l.verify(t)
}

func TestSIGTERMLeavesSandboxesForTheNextStart(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	l := live(p)
	p.end(syscall.SIGTERM)
	p.start()
	l.verify(t)
}

func TestCtrlCEndsSandboxesAndLeavesNothing(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	l := live(p)
	p.end(syscall.SIGINT)
	if left := leftovers(t, p.dir); len(left) > 0 {
		t.Errorf("left:\n%s", strings.Join(left, "\n"))
	}
	p.start()
	if ids := p.running(); len(ids) > 0 {
		t.Errorf("listed after Ctrl-C and a new start: %v", ids)
	}
	l.gone(t, 0)
}

func TestExpiryHappensWhileThePlatformIsDown(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	b := p.create(map[string]any{"timeout": 1})
	stays := p.create(nil)
	p.end(syscall.SIGKILL)
	p.start()
	b.gone(t, 10*time.Second)
	eventually(t, 10*time.Second, "nothing is left of the expired sandbox", nothingLeft(t, b))
	if got := p.running(); !slices.Equal(got, []string{stays.id}) {
		t.Errorf("running: %v, want %s", got, stays.id)
	}
}

func TestDownEndsWhatAKilledPlatformLeft(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	live(p)
	p.end(syscall.SIGKILL)
	p.wrenn("down", "--data", p.dir)
	if left := leftovers(t, p.dir); len(left) > 0 {
		t.Errorf("left:\n%s", strings.Join(left, "\n"))
	}
}
