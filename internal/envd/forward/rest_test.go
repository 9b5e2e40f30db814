package forward

import (
	"context"
	"log/slog"
	"net/netip"
	"os/exec"
	"sync/atomic"
	"testing"
	"time"
)

// counted stands in for the system's sockets: there are none, and it is counted
// how often that was asked.
type counted struct {
	looks atomic.Int64
	asked chan struct{}
}

func (c *counted) listeners() ([]listener, int, error) {
	c.looks.Add(1)
	select {
	case c.asked <- struct{}{}:
	default:
	}
	return nil, 0, nil
}

func (c *counted) costly() bool { return false }
func (c *counted) close()       {}

type exposesNothing struct{}

func (exposesNothing) expose(map[netip.AddrPort]netip.AddrPort) (bool, error) { return true, nil }
func (exposesNothing) intact() bool                                           { return true }
func (exposesNothing) own() []netip.AddrPort                                  { return nil }
func (exposesNothing) stop()                                                  {}
func (exposesNothing) close()                                                 {}

func TestAForwarderRestsWhileNothingRunsUntilItIsWoken(t *testing.T) {
	c := &counted{asked: make(chan struct{}, 1)}
	f := New(Config{Log: slog.New(slog.DiscardHandler), Idle: func() bool { return true }})
	f.open = func() (sockets, error) { return c, nil }
	f.expose = func(context.Context) (exposer, error) { return exposesNothing{}, nil }
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		f.Run(ctx, 0)
	}()
	<-c.asked
	time.Sleep(4 * interval)
	if n := c.looks.Load(); n != 1 {
		t.Errorf("it looked %d times, want once: nothing runs", n)
	}
	f.Wake(time.Hour)
	for range 3 { // from now on again and again
		select {
		case <-c.asked:
		case <-time.After(5 * time.Second):
			t.Fatal("it does not look although it was woken")
		}
	}
	cancel()
	<-ended
}

func TestChildlessTellsWhetherThereAreChildren(t *testing.T) {
	if !Childless() {
		t.Fatal("there are children, says Childless, before the first")
	}
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	if Childless() {
		t.Error("there are no children, says Childless, while one runs")
	}
	must(t, stdin.Close())
	must(t, cmd.Wait())
	if !Childless() {
		t.Error("there are children, says Childless, after the last")
	}
}

// losing exposes until somebody takes all away.
type losing struct {
	exposesNothing
	lost    atomic.Bool
	exposed chan struct{}
}

func (l *losing) intact() bool { return !l.lost.Load() }

func (l *losing) expose(map[netip.AddrPort]netip.AddrPort) (bool, error) {
	l.lost.Store(false)
	l.exposed <- struct{}{}
	return true, nil
}

func TestWhatIsLostIsExposedAgainWithTheNextLook(t *testing.T) {
	l := &losing{exposed: make(chan struct{}, 100)}
	f := New(Config{Log: slog.New(slog.DiscardHandler)})
	f.open = func() (sockets, error) { return &counted{}, nil }
	f.expose = func(context.Context) (exposer, error) { return l, nil }
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		f.Run(ctx, 0)
	}()
	<-l.exposed
	l.lost.Store(true)
	started := time.Now()
	<-l.exposed
	if took := time.Since(started); took >= addressLife {
		t.Errorf("only after %v, as if nothing had happened", took)
	}
	cancel()
	<-ended
}
