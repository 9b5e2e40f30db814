package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/wrenn/wrenn/internal/guest"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// managed is one sandbox that the agent owns.
type managed struct {
	id     sandbox.ID
	dir    string
	cancel context.CancelFunc // stops a Create that is under way
	gone   chan struct{}      // closed when all is freed

	// life is held while the sandbox is made or torn down. Lock order: life
	// before mu, and neither while Agent.mu is held.
	life sync.Mutex
	slot *network.Slot    // nil once released
	inst runtime.Instance // nil before it is made
	torn bool

	engineTook time.Duration // to start the runtime; for the log

	mu      sync.Mutex // guards what follows
	rec     record
	addr    netip.Addr // where the host reaches the guest; invalid before it serves
	guest   *guest.Client
	samples series
	logs    logBuffer
}

func newManaged(rec record, dir string) *managed {
	return &managed{
		id:     rec.ID,
		dir:    dir,
		cancel: func() {},
		gone:   make(chan struct{}),
		rec:    rec,
	}
}

// setState journals a new state before or after the act it stands for.
func (m *managed) setState(s sandbox.State) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rec.State = s
	return m.rec.save(m.dir)
}

// serving notes where the guest agent answers.
func (m *managed) serving(addr netip.Addr, c *guest.Client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.addr, m.guest = addr, c
}

// status is what others may know of m.
func (m *managed) status() (rec record, addr netip.Addr, c *guest.Client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rec, m.addr, m.guest
}

// stop ends a sandbox because somebody asked for it. It waits for a Create
// under way to give up, and for a teardown under way to finish.
func (a *Agent) stop(m *managed, reason string) error {
	m.cancel()
	a.pullLogs(m, 50*time.Millisecond)
	return a.teardown(m, sandbox.Stopped, reason, false)
}

// monitor waits for the end of an instance that nobody asked for.
func (a *Agent) monitor(m *managed, inst runtime.Instance) {
	select {
	case <-m.gone:
	case <-a.ctx.Done():
	case <-inst.Done():
		for {
			err := a.teardown(m, sandbox.Failed, inst.Exit().Reason, true)
			if err == nil {
				return
			}
			// Nobody else comes for it: to all others it is running until it is freed.
			a.log.Error("free ended sandbox", "sandbox", m.id, "err", err, "retry_in", teardownRetry)
			select {
			case <-m.gone:
				return
			case <-a.ctx.Done():
				return
			case <-time.After(teardownRetry):
			}
		}
	}
}

// teardown frees all that m holds, once; further calls do nothing. When a part
// fails the rest is freed all the same, m stays listed as Stopping and the next
// call tries again.
func (a *Agent) teardown(m *managed, end sandbox.State, reason string, announce bool) error {
	m.life.Lock()
	defer m.life.Unlock()
	if m.torn {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), teardownLimit)
	defer cancel()

	var errs []error
	if err := m.setState(sandbox.Stopping); err != nil {
		// A full disk must not keep a sandbox alive: the journal then says
		// running, and the next agent finds it dead and frees the same things.
		a.log.Warn("journal sandbox as stopping", "sandbox", m.id, "err", err)
	}
	a.data.Evict(string(m.id))
	if _, _, c := m.status(); c != nil {
		c.Close()
	}
	if m.inst != nil {
		errs = append(errs, m.inst.Stop(ctx))
	} else {
		errs = append(errs, a.cfg.Runtime.Discard(ctx, m.id, m.rec.RuntimeState))
	}
	if m.slot != nil {
		if err := a.slots.Release(ctx, m.slot); err != nil {
			errs = append(errs, fmt.Errorf("release slot %d: %w", m.slot.Index, err))
		} else {
			m.slot = nil
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("free sandbox %s: %w", m.id, err)
	}
	if err := os.RemoveAll(m.dir); err != nil {
		return fmt.Errorf("free sandbox %s: %w", m.id, err)
	}
	m.torn = true
	a.ended.add(obituary{
		ID: m.id, State: end, Reason: reason, Time: time.Now(),
		Logs: m.finalLogs(end, reason),
	}, announce)
	a.remove(m)
	close(m.gone)
	// The control plane, which knows why, tells the operator.
	a.log.Debug("sandbox freed", "sandbox", m.id, "state", end, "reason", reason)
	return nil
}
