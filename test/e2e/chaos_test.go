package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// chaosBox is a sandbox that one client uses, and what is known of it.
type chaosBox struct {
	id     string
	handle *client.Sandbox
	killed time.Time // of its engine; guarded by halves.mu

	low, high int    // the counter in its memory is between these
	file      string // content of /root/file; empty: not written, or not known
	token     int    // distinguishes what is asked of the counter
}

// chaosClient makes, uses and ends sandboxes.
type chaosClient struct {
	*halves
	name  string
	rng   *rand.Rand
	boxes []*chaosBox
	done  map[string]int // operations, by name
}

const chaosClients = 8

// TestChaos kills parts of a platform that eight clients use. CHAOS_SEED and
// CHAOS_KILLS set how; the same seed draws the same kills, pauses between them, and
// operations of each client.
func TestChaos(t *testing.T) {
	seed, n := uint64(time.Now().UnixNano()), 20
	if text := os.Getenv("CHAOS_SEED"); text != "" {
		v, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = v
	}
	if text := os.Getenv("CHAOS_KILLS"); text != "" {
		v, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		n = v
	}
	fmt.Printf("chaos: CHAOS_SEED=%d CHAOS_KILLS=%d\n", seed, n)
	t.Logf("replay with CHAOS_SEED=%d CHAOS_KILLS=%d", seed, n)
	h := newHalves(t)
	var stop atomic.Bool
	var clients sync.WaitGroup
	all := make([]*chaosClient, chaosClients)
	for i := range all {
		c := &chaosClient{halves: h, name: fmt.Sprint("client-", i), rng: rand.New(rand.NewPCG(seed, uint64(i)+1)), done: make(map[string]int)}
		all[i] = c
		clients.Go(func() {
			for !stop.Load() && !t.Failed() {
				c.step()
			}
		})
	}
	began := time.Now()
	done := h.kill(t.Context(), rand.New(rand.NewPCG(seed, 0)), n)
	stop.Store(true)
	clients.Wait()
	h.watchers.Wait()
	operations := map[string]int{}
	for _, c := range all {
		for name, n := range c.done {
			operations[name] += n
		}
	}
	t.Logf("%v: killed %d agents, %d servers, %d engines; operations: %v; the end of an engine was told within %v",
		time.Since(began).Round(time.Second), done.agent, done.server, done.engine, operations, h.slowest.Round(time.Millisecond))
	fmt.Printf("chaos: killed %+v in %v, operations %v\n", done, time.Since(began).Round(time.Second), operations)
	if t.Failed() {
		return
	}
	for _, c := range all {
		for len(c.boxes) > 0 {
			b := c.boxes[0]
			c.check(b) // which finds out that it is gone, where its engine was killed last
			if len(c.boxes) > 0 && c.boxes[0] == b {
				c.end(b)
			}
		}
	}
	h.nothingStays()
}

// step does one thing. It draws as many numbers whatever comes of it.
func (c *chaosClient) step() {
	what, which := c.rng.IntN(100), c.rng.IntN(1<<30)
	if len(c.boxes) == 0 || what < 10 && len(c.boxes) < 3 {
		c.create("base")
		return
	}
	b := c.boxes[which%len(c.boxes)]
	switch {
	case what < 45:
		c.check(b)
	case what < 60:
		c.write(b)
	case what < 75:
		c.pause(b, what%5 == 0)
	case what < 82:
		c.connect(b)
	case what < 87 && len(c.boxes) < 3:
		c.snapshot(b)
	case what < 91 && len(c.boxes) < 3:
		c.fork(b)
	default:
		c.end(b)
	}
}

func (c *chaosClient) fail(b *chaosBox, format string, args ...any) {
	c.t.Helper()
	id := "-"
	if b != nil {
		id = b.id
	}
	c.t.Errorf("%s, sandbox %s: "+format, append([]any{c.name, id}, args...)...)
}

// add takes a sandbox into the client's hands.
func (c *chaosClient) add(info client.Info, like *chaosBox) *chaosBox {
	b := &chaosBox{id: info.SandboxID, handle: c.client.Sandbox(info)}
	if like != nil {
		b.low, b.high, b.file, b.token = like.low, like.high, like.file, like.token+1_000_000
	}
	c.boxes = append(c.boxes, b)
	c.mu.Lock()
	c.halves.boxes[b.id] = b
	c.mu.Unlock()
	return b
}

func (c *chaosClient) drop(b *chaosBox) {
	for i, other := range c.boxes {
		if other == b {
			c.boxes = append(c.boxes[:i:i], c.boxes[i+1:]...)
			break
		}
	}
	c.mu.Lock()
	delete(c.halves.boxes, b.id)
	c.mu.Unlock()
}

// counter is a program with a number in its memory, which it tells, one higher, in
// a file for each question. A question may be asked again: the answer to the first
// time may have been lost on the way. So may the answer to its start: a second one
// ends itself.
const counter = `mkfifo /tmp/ask 2>/dev/null || exit; n=0; exec 3<>/tmp/ask; while read token <&3; do [ -e /tmp/answer.$token ] || { n=$((n+1)); echo $n >/tmp/.a; mv /tmp/.a /tmp/answer.$token; }; done`

func (c *chaosClient) create(template string) {
	var info client.Info
	err := c.insist("create", func(ctx context.Context) (err error) {
		info, err = c.client.Create(ctx, client.CreateRequest{TemplateID: template, Timeout: time.Hour, Metadata: map[string]string{"client": c.name}})
		return err
	})
	if err != nil {
		c.fail(nil, "create: %v", err)
		return
	}
	c.done["create"]++
	b := c.add(info, nil)
	c.ask(b, "start the counter", "[ -p /tmp/ask ] || (setsid sh -c '"+counter+"' >/dev/null 2>&1 & ); until [ -p /tmp/ask ]; do :; done; echo up", func(out string) {
		if out != "up" {
			c.fail(b, "the counter says %q", out)
		}
	})
}

// ask runs a script in a sandbox until it has answered, and resumes the sandbox
// where it is paused. It returns false when the sandbox is gone because its engine
// was killed.
func (c *chaosClient) ask(b *chaosBox, what, script string, answer func(string)) bool {
	var out bytes.Buffer
	err := c.insist(what, func(ctx context.Context) error {
		out.Reset()
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		p, err := b.handle.Start(ctx, client.Command{Path: "/bin/sh", Args: []string{"-c", script}, User: "root"})
		if err == nil {
			defer p.Close()
			var exit client.Exit
			if exit, err = p.Wait(&out, io.Discard); err == nil && exit.Status() != 0 {
				return &client.APIError{Op: what, Status: 500, Message: fmt.Sprintf("status %d: %s", exit.Status(), &out)}
			}
		}
		if errors.Is(err, sandbox.ErrNotFound) { // it does not run, or was paused under our feet
			_, _, cerr := c.client.Connect(ctx, b.id, client.ConnectRequest{Timeout: time.Hour})
			if cerr != nil {
				return cerr
			}
			return &client.APIError{Op: what, Status: 503, Message: "it was not running"}
		}
		return err
	})
	switch {
	case err == nil:
		answer(strings.TrimSpace(out.String()))
		return true
	case errors.Is(err, sandbox.ErrNotFound):
		c.mourn(b, err)
	default:
		c.fail(b, "%s: %v", what, err)
	}
	return false
}

// mourn accepts that a sandbox is gone if its engine was killed, and looks whether
// the platform says so in time.
func (c *chaosClient) mourn(b *chaosBox, err error) {
	killed := c.killedAt(b)
	if killed.IsZero() {
		events, _ := c.client.Events(c.t.Context(), b.id)
		c.fail(b, "it was lost: %v; %+v", err, events)
		c.drop(b)
		return
	}
	var api *client.APIError
	if !errors.As(err, &api) || !strings.Contains(api.Message, "ended") && !strings.Contains(api.Message, "it is being stopped") {
		c.fail(b, "the end of its engine is told as %v", err)
	}
	c.done["mourned"]++
	c.drop(b)
}

// check asks for what is in the sandbox's memory and in its file.
func (c *chaosClient) check(b *chaosBox) {
	began := time.Now()
	b.token++
	token := b.token
	b.high++ // it may be asked without our seeing the answer
	ok := c.ask(b, "ask the counter", fmt.Sprintf("echo %d >/tmp/ask; n=0; until [ -e /tmp/answer.%d ]; do n=$((n+1)); [ $n -lt 400 ] || exit 9; sleep 0.02; done; cat /tmp/answer.%d; cat /root/file 2>/dev/null || :",
		token, token, token), func(out string) {
		number, file, _ := strings.Cut(out, "\n")
		n, err := strconv.Atoi(number)
		if err != nil || n <= b.low || n > b.high {
			c.fail(b, "the counter says %q, want from %d to %d", number, b.low+1, b.high)
		}
		b.low, b.high = n, n
		if b.file != "" && file != b.file {
			c.fail(b, "its file says %q, want %q", file, b.file)
		}
	})
	if !ok {
		return
	}
	c.done["check"]++
	c.mu.Lock()
	if !b.killed.IsZero() && began.After(b.killed) { // what was killed was not what it runs in
		b.killed = time.Time{}
	}
	c.mu.Unlock()
}

func (c *chaosClient) write(b *chaosBox) {
	text := fmt.Sprint(c.name, " ", b.token, " ", len(b.file))
	b.file = "" // until it is known to be written
	if c.ask(b, "write a file", "printf %s '"+text+"' >/root/.f$$ && mv /root/.f$$ /root/file", func(string) {}) {
		b.file = text
		c.done["write"]++
	}
}

// end kills a sandbox, twice.
func (c *chaosClient) end(b *chaosBox) {
	for range 2 {
		err := c.insist("kill", func(ctx context.Context) error { return c.client.Kill(ctx, b.id) })
		if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
			c.fail(b, "kill: %v", err)
		}
	}
	if err := c.insist("get", func(ctx context.Context) error { _, err := c.client.Get(ctx, b.id); return err }); !errors.Is(err, sandbox.ErrNotFound) {
		c.fail(b, "after a kill: %v", err)
	}
	c.drop(b)
	c.done["kill"]++
}

// pause pauses a sandbox; with look it is looked at what state it is said to be in.
func (c *chaosClient) pause(b *chaosBox, look bool) {
	err := c.insist("pause", func(ctx context.Context) error {
		err := c.client.Pause(ctx, b.id, true)
		if errors.Is(err, sandbox.ErrConflict) { // paused, or on the way: by an earlier try
			return nil
		}
		return err
	})
	if errors.Is(err, sandbox.ErrNotFound) {
		c.mourn(b, err)
		return
	}
	if err != nil {
		c.fail(b, "pause: %v", err)
		return
	}
	c.done["pause"]++
	if look {
		c.told(b)
	}
}

// told waits until the platform tells a state that holds, and measures how long
// that takes after the last kill.
func (c *chaosClient) told(b *chaosBox) {
	var info client.Info
	err := c.insist("get", func(ctx context.Context) (err error) {
		info, err = c.client.Get(ctx, b.id)
		return err
	})
	switch {
	case errors.Is(err, sandbox.ErrNotFound):
		c.mourn(b, err)
	case err != nil:
		c.fail(b, "get: %v", err)
	case info.State != "running" && info.State != "paused":
		c.fail(b, "it is %q", info.State)
	}
}

func (c *chaosClient) connect(b *chaosBox) {
	err := c.insist("connect", func(ctx context.Context) error {
		_, _, err := c.client.Connect(ctx, b.id, client.ConnectRequest{Timeout: time.Hour})
		return err
	})
	switch {
	case errors.Is(err, sandbox.ErrNotFound):
		c.mourn(b, err)
	case err != nil:
		c.fail(b, "connect: %v", err)
	default:
		c.done["connect"]++
	}
}

// snapshot makes a snapshot and a sandbox of it, and deletes the snapshot.
func (c *chaosClient) snapshot(b *chaosBox) {
	var s client.Snapshot
	err := c.insist("snapshot", func(ctx context.Context) (err error) {
		s, err = c.client.Snapshot(ctx, b.id, "")
		return err
	})
	if errors.Is(err, sandbox.ErrNotFound) {
		c.mourn(b, err)
		return
	}
	if err != nil {
		c.fail(b, "snapshot: %v", err)
		return
	}
	var info client.Info
	err = c.insist("create from a snapshot", func(ctx context.Context) (err error) {
		info, err = c.client.Create(ctx, client.CreateRequest{TemplateID: s.SnapshotID, Timeout: time.Hour, Metadata: map[string]string{"client": c.name}})
		return err
	})
	if err != nil {
		c.fail(b, "create from a snapshot: %v", err)
	} else {
		c.add(info, b)
	}
	err = c.insist("delete snapshot", func(ctx context.Context) error { return c.client.DeleteSnapshot(ctx, s.SnapshotID) })
	if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		c.fail(b, "delete snapshot: %v", err)
	}
	c.done["snapshot"]++
}

func (c *chaosClient) fork(b *chaosBox) {
	var forks []client.Fork
	err := c.insist("fork", func(ctx context.Context) (err error) {
		forks, err = c.client.Fork(ctx, b.id, 2, time.Hour)
		return err
	})
	if errors.Is(err, sandbox.ErrNotFound) {
		c.mourn(b, err)
		return
	}
	if err != nil {
		c.fail(b, "fork: %v", err)
		return
	}
	for _, f := range forks {
		switch {
		case f.Err == nil:
			c.add(f.Sandbox, b)
		case !passing(f.Err) && !errors.Is(f.Err, sandbox.ErrNotFound): // its image may have gone with the agent's answer
			c.fail(b, "fork: %v", f.Err)
		}
	}
	c.done["fork"]++
}

// nothingStays ends what nobody knows of any more (the answers to its creation were
// lost), and looks whether anything is left then.
func (h *halves) nothingStays() {
	t := h.t
	var all []client.Info
	if err := h.insist("list", func(ctx context.Context) (err error) {
		all, err = h.client.ListAll(ctx, client.ListQuery{})
		return err
	}); err != nil {
		t.Errorf("list: %v", err)
	}
	for _, info := range all {
		err := h.insist("kill", func(ctx context.Context) error { return h.client.Kill(ctx, info.SandboxID) })
		if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("kill %s, which is %s: %v", info.SandboxID, info.State, err)
		}
	}
	var snapshots []client.Snapshot
	if err := h.insist("list snapshots", func(ctx context.Context) (err error) {
		snapshots, err = h.client.Snapshots(ctx, client.SnapshotQuery{})
		return err
	}); err != nil {
		t.Errorf("list snapshots: %v", err)
	}
	for _, s := range snapshots {
		err := h.insist("delete snapshot", func(ctx context.Context) error { return h.client.DeleteSnapshot(ctx, s.SnapshotID) })
		if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("delete snapshot %s: %v", s.SnapshotID, err)
		}
	}
	eventually(t, 20*time.Second, "no sandbox is left", func() error {
		if dirs := matches("", filepath.Join(h.dir, "agent", "sandboxes", "*")); len(dirs) > 0 {
			return fmt.Errorf("%v", dirs)
		}
		return nil
	})
	eventually(t, 2*time.Minute, "no image is left", func() error { // what no record names is kept for a while
		if dirs := matches("", filepath.Join(h.dir, "agent", "images", "*")); len(dirs) > 0 {
			return fmt.Errorf("%v", dirs)
		}
		return nil
	})
	if n := h.goroutines(); n > 200 {
		t.Errorf("the server has %d goroutines", n)
	}
	if fds := matches("", fmt.Sprintf("/proc/%d/fd/*", h.processes["server"].Process.Pid)); len(fds) > 300 {
		t.Errorf("the server has %d files open", len(fds))
	}
	// What waits in the pool goes with the agent, and then there has to be nothing.
	h.end("server", syscall.SIGTERM)
	h.end("agent", syscall.SIGTERM)
	left := append(leftovers(t, h.dir), matches("instance", filepath.Join(h.dir, "agent", "instances", "*"))...)
	left = append(left, matches("half-written", filepath.Join(h.dir, "agent", "*", ".*"))...)
	if len(left) > 0 {
		t.Errorf("left of a platform without sandboxes that was stopped:\n%s", strings.Join(left, "\n"))
	}
}

// goroutines is how many the server has.
func (h *halves) goroutines() int {
	req, err := http.NewRequest("GET", "http://"+h.listen+"/metrics", nil)
	if err != nil {
		h.t.Error(err)
		return 0
	}
	req.Header.Set("X-API-Key", h.key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		h.t.Error(err)
		return 0
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		h.t.Error(err)
	}
	_, rest, _ := strings.Cut(string(body), "\ngo_goroutines ")
	line, _, _ := strings.Cut(rest, "\n")
	n, err := strconv.Atoi(line)
	if err != nil {
		h.t.Errorf("goroutines of the server: %v", err)
	}
	return n
}
