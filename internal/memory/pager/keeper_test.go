package pager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/process"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// keep is a keeper of pagers that are processes of their own.
func keep(t *testing.T, socket string) *Keeper {
	t.Helper()
	return keepMode(t, socket, "pager")
}

func keepMode(t *testing.T, socket, mode string) *Keeper {
	t.Helper()
	order, err := json.Marshal(childOrder{Mode: mode, Socket: socket})
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(socket + ".log")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := End(context.Background(), socket); err != nil {
			t.Error(err)
		}
		log.Close()
		said, err := os.ReadFile(log.Name())
		t.Logf("%s (%v)", said, err)
	})
	return NewKeeper(socket, func(ctx context.Context) (*Client, error) {
		return Start(ctx, socket, []string{"env", childEnv + "=" + string(order), os.Args[0]}, log)
	})
}

// watch has a keeper watch until the end of the test, or until stop is called.
func watch(t *testing.T, k *Keeper) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { k.Watch(ctx, slog.New(slog.NewTextHandler(t.Output(), nil))) })
	stop = func() {
		cancel()
		wg.Wait()
	}
	t.Cleanup(stop)
	return stop
}

// kill ends the pager of a client as the kernel does when memory is short.
func kill(t *testing.T, c *Client) process.ID {
	t.Helper()
	h, err := peer(c.conn, os.Geteuid())
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if err := h.Kill(); err != nil {
		t.Fatal(err)
	}
	<-c.Gone()
	return h.ID
}

// TestPagerKilled kills the pager under virtual machines: they end at once and with a
// reason, though nobody asks for the pager; also when nobody watched as it was killed.
func TestPagerKilled(t *testing.T) {
	t.Parallel()
	f := newFixture(t, 64, 1, nil)
	socket := f.dir + "/killed"
	k := keep(t, socket)
	stop := watch(t, k)
	for _, watched := range []bool{true, false} {
		var err error
		if f.client, err = k.Connect(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.client.Close() })
		vm := f.vm(fmt.Sprint("watched-", watched))
		vm.Around, vm.ReasonFile = 4096, f.dir+"/reason-"+vm.ID
		m := f.monitor(t, vm, "script", 1, false)
		if got := m.ask(t, "read 3"); got != fmt.Sprint(f.data[3*4096]) {
			t.Errorf("the page reads %s", got)
		}
		if !watched {
			stop()
		}
		was := kill(t, f.client)
		m.say(t, "read 40")
		if !watched {
			k = keep(t, socket) // the next agent's
			watch(t, k)
		}
		var exit *exec.ExitError
		if err := m.cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Errorf("the monitor ends with %v, want it killed", err)
		}
		if why, err := os.ReadFile(vm.ReasonFile); err != nil || string(why) != "its pager was killed" {
			t.Errorf("the reason is %q (%v)", why, err)
		}
		again, err := k.Connect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		now, err := peer(again.conn, os.Geteuid())
		if err != nil {
			t.Fatal(err)
		}
		now.Close()
		if now.ID == was {
			t.Error("the pager is the one that was killed")
		}
	}
}

// TestLongPath has sockets whose paths are longer than an address.
func TestLongPath(t *testing.T) {
	t.Parallel()
	f := newFixture(t, 16, 1, nil)
	dir := f.dir + "/" + strings.Repeat("x", 120)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	socket := dir + "/pager"
	if err := End(t.Context(), socket); err != nil {
		t.Errorf("end a pager that is not there: %v", err)
	}
	k := keep(t, socket)
	var err error
	if f.client, err = k.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer f.client.Close()
	vm := f.vm("a")
	vm.Socket = dir + "/a.sock"
	f.monitor(t, vm, "touch", 2, false).succeeds(t)
	if err := Drop(t.Context(), socket, vm.ID); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(vm.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the machine's socket is left: %v", err)
	}
}

// TestSelf starts a pager from a program whose file is gone, as after an upgrade.
func TestSelf(t *testing.T) {
	t.Parallel()
	newFixture(t, 1, 1, nil) // skips
	dir := t.TempDir()
	program, err := os.ReadFile(Self)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/program", program, 0o700); err != nil {
		t.Fatal(err)
	}
	order, err := json.Marshal(childOrder{Mode: "agent", Socket: dir + "/pager", Memory: dir + "/program"})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), dir+"/program")
	cmd.Env = append(os.Environ(), childEnv+"="+string(order))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	c, err := Dial(t.Context(), dir+"/pager")
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := End(t.Context(), dir+"/pager"); err != nil {
		t.Error(err)
	}
}

// TestConnectTogether asks for a pager from many goroutines before there is one.
func TestConnectTogether(t *testing.T) {
	t.Parallel()
	k := keep(t, t.TempDir()+"/pager")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			c, err := k.Connect(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			c.Close()
		})
	}
	wg.Wait()
}

// TestEarlierPager finds the pager of an earlier version: it is replaced when it serves
// nobody, and used until then.
func TestEarlierPager(t *testing.T) {
	t.Parallel()
	f := newFixture(t, 16, 1, nil)
	socket := f.dir + "/earlier"
	connect := func(mode string) (*Client, process.ID) {
		c, err := keepMode(t, socket, mode).Connect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		h, err := peer(c.conn, os.Geteuid())
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		return c, h.ID
	}
	old, pid := connect("earlier")
	f.client = old
	m := f.monitor(t, f.vm("a"), "script", 1, false)
	same, now := connect("pager")
	if now != pid || same.version != 1 {
		t.Errorf("while it serves a machine it is process %v, now %v", pid, now)
	}
	vm := f.vm("b")
	vm.Image += "-none"
	if err := same.Register(t.Context(), vm); err == nil || !strings.Contains(err.Error(), "earlier version") {
		t.Errorf("what it cannot do is told as %v", err)
	}
	m.ask(t, "read 3")
	m.succeeds(t)
	for st, err := old.Status(t.Context(), "a"); st.State != StateEnded; st, err = old.Status(t.Context(), "a") {
		if err != nil {
			t.Fatal(err)
		}
	}
	if c, now := connect("pager"); now == pid || c.version != Version {
		t.Errorf("when it serves nobody it is process %v still, of version %d", now, c.version)
	}
}

// TestHungPager stops the pager as a sick host may. Who asks it is told soon, and in the
// end it is killed, so that its virtual machines end.
func TestHungPager(t *testing.T) {
	t.Parallel()
	f := newFixture(t, 16, 1, nil)
	socket := f.dir + "/hung"
	k := keep(t, socket)
	k.ask, k.patient = 100*time.Millisecond, time.Second
	var err error
	if f.client, err = k.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer f.client.Close()
	m := f.monitor(t, f.vm("a"), "script", 1, false)
	m.ask(t, "read 3") // it is known by now
	h, err := peer(f.client.conn, os.Geteuid())
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if err := syscall.Kill(h.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := Drop(t.Context(), socket, "none"); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("who asks is told: %v", err)
	}
	watch(t, k)
	if err := m.cmd.Wait(); err == nil {
		t.Error("its monitor ends by itself, want it killed")
	}
	again, err := k.Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	now, err := peer(again.conn, os.Geteuid())
	if err != nil {
		t.Fatal(err)
	}
	defer now.Close()
	if now.ID == h.ID {
		t.Error("the pager is the one that hung")
	}
}

// TestOrphansOnAFullDisk ends the monitors of a pager that was killed, also where their
// reason cannot be written.
func TestOrphansOnAFullDisk(t *testing.T) {
	t.Parallel()
	p := newPager(slog.New(slog.NewTextHandler(t.Output(), nil)))
	p.socket = t.TempDir() + "/pager"
	var all []noted
	var orphans []*exec.Cmd
	for range 3 {
		c := exec.CommandContext(t.Context(), "sleep", "600")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		id, err := process.Identify(c.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		orphans, all = append(orphans, c), append(all, noted{id, "/dev/full"})
	}
	b, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(monitorsFile(p.socket), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.endOrphans(); err != nil {
		t.Error(err)
		return // the test's end kills them
	}
	for _, c := range orphans {
		var exit *exec.ExitError
		if err := c.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Errorf("an orphan ends with %v, want it killed", err)
		}
	}
}

// TestPatience has a pager that could not be started for a while and then does not answer
// once: it is not taken to hang for that.
func TestPatience(t *testing.T) {
	t.Parallel()
	socket := t.TempDir() + "/pager"
	if err := os.WriteFile(monitorsFile(socket), nil, 0o600); err != nil { // so that it is watched for at once
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	tries := 0
	k := NewKeeper(socket, func(context.Context) (*Client, error) {
		switch tries++; tries {
		case 1:
			return nil, errors.New("no file can be opened")
		case 2:
			return nil, errSilent
		}
		cancel()
		return nil, errGone
	})
	k.patient = shortestLife / 2
	var said strings.Builder
	k.Watch(ctx, slog.New(slog.NewTextHandler(&said, nil)))
	if tries != 3 || strings.Contains(said.String(), "hangs") || !strings.Contains(said.String(), "does not answer") {
		t.Errorf("after %d tries it says:\n%s", tries, &said)
	}
}
