package e2e

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/process"
)

// The bounds are some ten times what a host with two processors needs.
const (
	healthBound = 10 * time.Second // for one answer of the guest agent in distress
	killBound   = 30 * time.Second // for a kill to be answered
	quietBound  = 30 * time.Second // for everything to be as before
)

// pulse asks the sandbox's agent whether it is well, again and again.
type pulse struct {
	b     *box
	stop  context.CancelFunc
	ended chan struct{}

	asked   int
	longest time.Duration
	failed  error
}

func (b *box) feelPulse() *pulse {
	ctx, cancel := context.WithCancel(context.Background())
	p := &pulse{b: b, stop: cancel, ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		for ctx.Err() == nil && p.failed == nil {
			begin := time.Now()
			err := b.health(ctx)
			if ctx.Err() != nil {
				return
			}
			p.asked, p.failed = p.asked+1, err
			p.longest = max(p.longest, time.Since(begin))
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond): // between two questions
			}
		}
	}()
	b.p.t.Cleanup(func() { cancel(); <-p.ended })
	return p
}

func (b *box) health(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, healthBound)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", b.p.url+"/health", nil)
	if err != nil {
		return err
	}
	resp, err := b.RoundTrip(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		return fmt.Errorf("GET /health: %s", resp.Status)
	}
	return nil
}

// steady checks that the agent has answered all along.
func (p *pulse) steady() {
	p.b.p.t.Helper()
	p.stop()
	<-p.ended
	p.b.p.t.Logf("%d answers of the agent, the slowest after %s", p.asked, p.longest)
	if p.failed != nil {
		p.b.p.t.Errorf("the agent did not answer all along: %v", p.failed)
	} else if p.asked == 0 {
		p.b.p.t.Error("the agent has not answered once")
	}
}

// sigkill kills a process as a client does; it may have ended before.
func (s *session) sigkill() {
	s.b.p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), killBound)
	defer cancel()
	begin := time.Now()
	_, err := s.b.processes.SendSignal(ctx, &process.SendSignalRequest{
		Process: byPID(s.pid), Signal: process.Signal_SIGNAL_SIGKILL,
	})
	if err != nil && connect.CodeOf(err) != connect.CodeNotFound {
		s.b.p.t.Fatalf("kill process %d: %v", s.pid, err)
	}
	s.b.p.t.Logf("killed after %s: %v", time.Since(begin), err)
}

// quiet waits until only the agent and the one who asks are left.
func (b *box) quiet() {
	b.p.t.Helper()
	eventually(b.p.t, quietBound, "the sandbox is quiet again", func() error {
		r := b.try("ls -d /proc/[0-9]* | wc -l")
		n, err := strconv.Atoi(strings.TrimSpace(r.stdout))
		if r.err != nil || err != nil {
			return fmt.Errorf("cannot look: %s", r)
		}
		if n > 6 {
			return fmt.Errorf("%d processes are left", n)
		}
		return nil
	})
}

func TestProgramsOutOfHandLeaveTheAgentInCharge(t *testing.T) {
	p := startPlatform(t)
	for _, c := range []struct{ name, script string }{
		{"a fork bomb of a user", `echo armed; exec su user -s /bin/bash -c ':(){ :|:& };:; sleep 100'`},
		{"a fork bomb of root", `echo armed; :(){ :|:& };:; sleep 100`},
		{"sessions of their own without end", `echo armed; while :; do setsid sleep 1000 & done 2>/dev/null`},
		{"a hundred busy loops", `echo armed; for i in $(seq 100); do (while :; do :; done) & done; wait`},
		{"threads without end", `echo armed; exec python3 -c '
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(1000,)).start()
    except RuntimeError: time.sleep(.01)'`},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := p.with(t).create(nil)
			b.run("true")
			pulse := b.feelPulse()
			bomb := b.background(c.script, false)
			bomb.says("armed")
			time.Sleep(4 * time.Second) // for it to spread
			bomb.sigkill()
			b.quiet()
			pulse.steady()
			b.kill()
		})
	}
}

func TestWhenMemoryRunsOutTheLargestIsKilledAndTheSandboxStays(t *testing.T) {
	p := smallPlatform(t)
	b := p.create(nil)
	small := b.background("echo small; exec sleep 1000", false)
	small.says("small")
	pulse := b.feelPulse()
	hog := b.background(`exec python3 -c '
a = []
while True: a.append(b"x" * (1 << 20))'`, false)
	if err := hog.end(60 * time.Second); err != nil {
		t.Errorf("the stream of the hog ended with %v; want the process's own end", err)
	}
	if got := b.run("echo fine"); got != "fine\n" {
		t.Errorf("afterwards it says %q", got)
	}
	pulse.steady()
	select {
	case err := <-small.ended:
		t.Errorf("the small process has ended too: %v", err)
	default:
	}
}

func TestTheAgentAnswersWhenTheDiskIsFull(t *testing.T) {
	p := smallPlatform(t)
	b := p.create(nil)
	pulse := b.feelPulse()
	fill := b.background(`cat /dev/zero > /root/big; cat /dev/zero > /tmp/big; cat /dev/zero > /dev/shm/big; echo full; exec sleep 1000`, false)
	fill.says("full")
	if got := b.run("echo fine"); got != "fine\n" {
		t.Errorf("on a full disk it says %q", got)
	}
	fill.sigkill()
	b.run("rm /root/big /tmp/big /dev/shm/big && echo ok > /root/small")
	b.quiet()
	pulse.steady()
}

func TestProgramsInsideCannotUseUpTheAgentsConnections(t *testing.T) {
	p := startPlatform(t)
	b := p.create(nil)
	pulse := b.feelPulse()
	flood := b.background(`exec python3 -c '
import socket, time
held, own = [], socket.gethostbyname(socket.gethostname())
files = []
for i in range(3000):
    s = socket.socket(); s.settimeout(5)
    try:
        s.connect((("127.0.0.1", own)[i % 2], 49983))
        s.send(b"GET /health HTTP/1.1\r\nX-Slow: ")
    except OSError: pass
    held.append(s)
try:
    while True: files.append(open("/dev/null"))
except OSError: pass
print("flooded", len(files), flush=True)
time.sleep(1000)'`, false)
	eventually(t, 90*time.Second, "connections are opened", func() error {
		if !strings.Contains(flood.output(), "flooded") {
			return fmt.Errorf("it says %q", flood.output())
		}
		return nil
	})
	if got := b.run("echo fine"); got != "fine\n" {
		t.Errorf("during the flood it says %q", got)
	}
	flood.sigkill()
	b.quiet()
	pulse.steady()
	if got := b.run(`python3 -c 'import urllib.request as u; print(u.urlopen("http://127.0.0.1:49983/health").status)'`); got != "204\n" {
		t.Errorf("from inside, after the flood, the agent says %q", got)
	}
}

func TestSignalsFromInsideDoNotEndTheAgent(t *testing.T) {
	p := startPlatform(t)
	b := p.create(nil)
	b.run("kill -TERM 1; kill -INT 1; kill -HUP 1; kill -QUIT 1; kill -SEGV 1; kill -ABRT 1; kill -PIPE 1; kill -USR1 1; kill -PWR 1")
	b.try("kill -9 -1")
	if got := b.run("echo fine"); got != "fine\n" {
		t.Errorf("it says %q", got)
	}
}
