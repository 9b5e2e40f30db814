package agent

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/wrenn/wrenn/internal/guest"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// managed is one sandbox that the agent owns: running, paused, or between.
type managed struct {
	id   sandbox.ID
	dir  string        // its journal, and its image while it is paused
	gone chan struct{} // closed when all is freed

	// life is held while the sandbox goes from one state to another, and while it
	// is torn down. Lock order: life before mu, and neither while Agent.mu is held.
	life sync.Mutex
	unit *unit // nil while it is paused and before it is made
	torn bool

	still bool  // it was adopted and has not been seen to go on
	asked *unit // that is asked again and again to go on; life holds it

	mu      sync.Mutex // guards what follows
	rec     record
	cancel  context.CancelFunc // gives up what is under way
	resting context.CancelFunc // gives up what is done while it is paused
	ending  bool               // stop was called: nothing new begins
	addr    netip.Addr         // where the host reaches the guest; invalid unless it serves
	guest   *guest.Client
	samples series
	logs    logBuffer
}

func newManaged(rec record, dir string) *managed {
	return &managed{
		id:      rec.ID,
		dir:     dir,
		cancel:  func() {},
		resting: func() {},
		gone:    make(chan struct{}),
		rec:     rec,
	}
}

func (m *managed) imageDir() string { return filepath.Join(m.dir, "image") }

// setState journals a new state before or after the act it stands for, with what
// else the record is to say then.
func (m *managed) setState(s sandbox.State, change ...func(*record)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range change {
		f(&m.rec)
	}
	if m.rec.State != s {
		m.rec.State, m.rec.Changed = s, time.Now()
	}
	return m.rec.save(m.dir)
}

// serving notes the unit that the sandbox runs in now.
func (m *managed) serving(u *unit) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.addr, m.guest = u.slot.HostAddr, u.guest
}

// silent notes that there is nobody to talk to.
func (m *managed) silent() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.addr, m.guest = netip.Addr{}, nil
}

// begin makes what is about to be done something that stop can break off. The
// error says that the sandbox is ending.
func (m *managed) begin(cancel context.CancelFunc) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ending {
		return sandbox.Errorf(sandbox.ErrNotFound, "sandbox %s is being stopped", m.id)
	}
	m.cancel = cancel
	return nil
}

// rest makes what is about to be done, while m is paused, something that is given up when
// m goes on or ends.
func (m *managed) rest(cancel context.CancelFunc) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.resting = cancel
}

func (m *managed) disturb() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.resting()
}

// status is what others may know of m.
func (m *managed) status() (rec record, addr netip.Addr, c *guest.Client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rec, m.addr, m.guest
}

func (m *managed) policy() network.Policy { return network.Policy{AllowInternet: m.rec.AllowInternet} }

// stop ends a sandbox because somebody asked for it. It waits for what is under
// way to give up, and for a teardown under way to finish.
func (a *Agent) stop(m *managed, reason string) error {
	m.mu.Lock()
	m.ending = true
	cancel := m.cancel
	m.resting()
	m.mu.Unlock()
	cancel()
	a.pullLogs(m, 50*time.Millisecond)
	m.life.Lock()
	defer m.life.Unlock()
	return a.teardown(m, sandbox.Stopped, reason, false)
}

// monitor waits for the end of an instance that nobody asked for.
func (a *Agent) monitor(m *managed, u *unit) {
	select {
	case <-m.gone:
		return
	case <-a.ctx.Done():
		return
	case <-u.inst.Done():
	}
	for {
		m.life.Lock()
		if m.unit != u { // it was paused, or is gone: this is what was asked for
			m.life.Unlock()
			return
		}
		err := a.teardown(m, sandbox.Failed, u.inst.Exit().Reason, true)
		m.life.Unlock()
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

// teardown frees all that m holds, once; further calls do nothing. When a part
// fails m stays listed as Stopping and the next call tries again. The caller holds
// m.life.
func (a *Agent) teardown(m *managed, end sandbox.State, reason string, announce bool) error {
	if m.torn {
		return nil
	}
	if err := m.setState(sandbox.Stopping, func(r *record) { r.End, r.Reason = end, reason }); err != nil {
		// A full disk must not keep a sandbox alive: the journal then says
		// running, and the next agent finds it dead and frees the same things.
		a.log.Warn("journal sandbox as stopping", "sandbox", m.id, "err", err)
	}
	a.data.Evict(string(m.id))
	if m.unit != nil {
		if err := a.freeUnit(m.unit); err != nil {
			return err
		}
	}
	ob := obituary{ID: m.id, State: end, Reason: reason, Time: time.Now()}
	a.journalEnd(ob)
	if err := os.RemoveAll(m.dir); err != nil {
		return err
	}
	m.torn = true
	ob.Logs = m.finalLogs(end, reason)
	a.ended.add(ob, announce)
	a.remove(m)
	close(m.gone)
	// The control plane, which knows why, tells the operator.
	a.log.Debug("sandbox freed", "sandbox", m.id, "state", end, "reason", reason)
	return nil
}
