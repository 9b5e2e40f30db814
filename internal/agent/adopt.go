package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/internal/guest"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// adoptAll goes through the journal: what runs or is paused is taken over,
// everything else is freed and remembered with its reason. It runs before the slots
// are opened, which then frees every slot that is not in use.
func (a *Agent) adoptAll(ctx context.Context) ([]*managed, error) {
	records, err := loadRecords(a.sandboxesDir())
	if err != nil {
		return nil, err
	}
	var (
		mu      sync.Mutex
		adopted []*managed
		g       errgroup.Group
	)
	g.SetLimit(8)
	for _, rec := range records {
		g.Go(func() error {
			m, err := a.adopt(ctx, rec)
			if err != nil {
				return fmt.Errorf("take over sandbox %s: %w", rec.ID, err)
			}
			if m != nil {
				mu.Lock()
				defer mu.Unlock()
				adopted = append(adopted, m)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return adopted, a.discardStrays(adopted)
}

// adopt takes over one sandbox, or frees it and returns nil.
func (a *Agent) adopt(ctx context.Context, rec record) (*managed, error) {
	m := newManaged(rec, a.sandboxDir(rec.ID))
	end, reason := sandbox.Failed, "the host agent was restarted while the sandbox was being started"
	switch rec.State {
	case sandbox.Running, sandbox.Pausing:
		// A pause that did not get to its end is undone, if there is what to go
		// on with.
		u := &unit{id: rec.Instance, dir: a.instanceDir(rec.Instance)}
		inst, err := a.adoptInstance(ctx, rec)
		switch {
		case err == nil:
			u.inst, m.unit = inst, u
			if rec.State == sandbox.Pausing {
				return m, nil // see goOn
			}
			// A snapshot may have frozen it.
			if m.still = a.letGoOn(ctx, u); ctx.Err() != nil {
				return nil, ctx.Err() // it is for the next agent
			}
			return m, removeImage(m.imageDir())
		case errors.Is(err, sandbox.ErrNotFound):
			reason = "the sandbox ended while the host agent was down"
			if gone := new(sandbox.Error); errors.As(err, &gone) && gone.Cause != nil {
				reason += ": " + gone.Cause.Error()
			}
			if rec.State == sandbox.Pausing && a.wasPaused(m) {
				return m, nil
			}
		case errors.Is(err, sandbox.ErrInvalid):
			// It may be running, but nobody would know its end or its network.
			reason = "the host agent's record of it was damaged"
		case ctx.Err() != nil:
			return nil, ctx.Err()
		default: // one that cannot be taken over must not keep the others from whoever they belong to
			a.log.Error("sandbox cannot be taken over", "sandbox", rec.ID, "err", err)
			reason = "the host agent was restarted and could not take it over"
		}
	case sandbox.Paused, sandbox.Resuming:
		if a.wasPaused(m) {
			return m, nil
		}
		reason = "its image is gone"
	case sandbox.Stopping:
		end, reason = sandbox.Stopped, "it was killed"
		if rec.Reason != "" {
			end, reason = rec.End, rec.Reason
		}
	}
	if err := a.cfg.Runtime.Discard(ctx, rec.ID, nil); err != nil { // of a version that had no instances
		return nil, err
	}
	ob := obituary{ID: rec.ID, State: end, Reason: reason, Time: time.Now()}
	a.journalEnd(ob)
	if err := os.RemoveAll(m.dir); err != nil {
		return nil, err
	}
	ob.Logs = m.finalLogs(end, reason)
	a.ended.add(ob, false)
	a.log.Info("freed what a dead sandbox left", "sandbox", rec.ID, "was", rec.State, "reason", reason)
	return nil, nil
}

// adoptLimit is how long an instance is asked for that cannot be taken over for a reason
// that is not its own, as where too many files are open: it may pass.
const adoptLimit = 10 * time.Second

func (a *Agent) adoptInstance(ctx context.Context, rec record) (runtime.Instance, error) {
	until := time.Now().Add(adoptLimit)
	for {
		inst, err := a.cfg.Runtime.Adopt(ctx, rec.Instance, rec.RuntimeState)
		if err == nil || errors.Is(err, sandbox.ErrNotFound) || errors.Is(err, sandbox.ErrInvalid) || time.Now().After(until) {
			return inst, err
		}
		a.log.Warn("sandbox is not taken over; it is tried again", "sandbox", rec.ID, "err", err)
		select {
		case <-time.After(teardownRetry):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// answerLimit is how long the start waits for one instance to answer.
const answerLimit = 5 * time.Second

// letGoOn lets an adopted instance go on, and says whether it may stand still yet: on a
// busy host an engine may take its time to answer.
func (a *Agent) letGoOn(ctx context.Context, u *unit) (still bool) {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	if err := u.inst.Resume(ctx); err != nil {
		a.log.Warn("sandbox does not go on; it is asked again", "instance", u.id, "err", err)
		return true
	}
	return false
}

// longestSilence is the longest wait before an instance that does not answer is asked
// again.
const longestSilence = time.Minute

// letGoOnLater has the instance asked in the background until it goes on, or has ended,
// or is m's no more. What does not answer is alive, and not ended for that. The caller
// holds m.life.
func (a *Agent) letGoOnLater(m *managed, u *unit) {
	if m.asked == u {
		return
	}
	m.asked = u
	a.wg.Go(func() {
		for wait := teardownRetry; ; wait = min(2*wait, longestSilence) {
			select {
			case <-u.inst.Done(): // the monitor tells why
				return
			case <-m.gone:
				return
			case <-a.ctx.Done():
				return
			case <-time.After(wait):
			}
			if !a.askAgain(m, u) {
				return
			}
		}
	})
}

// askAgain lets the instance go on, and says whether it is to be asked once more.
func (a *Agent) askAgain(m *managed, u *unit) (again bool) {
	m.life.Lock()
	defer m.life.Unlock()
	ctx, cancel := context.WithCancel(a.ctx)
	defer cancel()
	// Who wants it gone does not wait for its answer.
	again = m.unit == u && m.begin(cancel) == nil && a.letGoOn(ctx, u) && ctx.Err() == nil
	if !again && m.asked == u {
		m.asked = nil
	}
	return again
}

// wasPaused reports whether there is an image to go on from, be it one that this
// engine refuses: whoever wants to resume the sandbox is told why. What a resume
// that was cut off has made is freed as a stray.
func (a *Agent) wasPaused(m *managed) bool {
	im, err := openImage(m.imageDir(), a.cfg.Runtime)
	if errors.Is(err, sandbox.ErrNotFound) {
		return false
	}
	err = m.setState(sandbox.Paused, func(r *record) {
		r.Instance, r.Slot, r.RuntimeState, r.ImageBytes = "", 0, nil, im.bytes()
	})
	if err = errors.Join(err, os.RemoveAll(smaller(m.imageDir()))); err != nil { // the latter of a kill in a compression
		a.log.Warn("journal sandbox as paused", "sandbox", m.id, "err", err) // the next start comes to the same
	}
	return true
}

// discardStrays frees every instance that no sandbox runs in: of the pool, of what
// was being started or freed when the agent was killed. One that cannot be freed
// just now is tried again in the background: it must not keep the others from
// whoever they belong to.
func (a *Agent) discardStrays(adopted []*managed) error {
	used := make(map[sandbox.ID]bool, len(adopted))
	for _, m := range adopted {
		if m.unit != nil {
			used[m.unit.id] = true
		}
	}
	entries, err := os.ReadDir(a.instancesDir())
	if err != nil {
		return fmt.Errorf("list instances: %w", err)
	}
	var g errgroup.Group
	g.SetLimit(8)
	for _, e := range entries {
		id, err := sandbox.ParseID(e.Name())
		if err != nil || used[id] {
			continue
		}
		u := &unit{id: id, dir: a.instanceDir(id)}
		g.Go(func() error {
			if err := a.freeUnit(u); err != nil {
				a.log.Error("free what a killed agent left", "instance", id, "err", err)
				a.release(u)
			}
			return nil
		})
	}
	return g.Wait()
}

// takeOver puts an adopted sandbox under supervision. Its access token is not
// known until the control plane gives it again.
func (a *Agent) takeOver(m *managed) {
	a.mu.Lock()
	a.sandboxes[m.id] = m
	a.mu.Unlock()
	if m.unit == nil {
		a.log.Info("took over paused sandbox", "sandbox", m.id)
		return
	}
	slot, ok := a.slots.Adopted(m.rec.Slot)
	if !ok {
		m.life.Lock()
		defer m.life.Unlock()
		if err := a.teardown(m, sandbox.Failed, "its network was lost while the host agent was down", false); err != nil {
			a.log.Error("free sandbox without network", "sandbox", m.id, "err", err)
		}
		return
	}
	u := m.unit
	u.slot, u.guest = slot, guest.NewClient(slot.HostAddr, "")
	pausing := m.rec.State == sandbox.Pausing // before others know of it
	if !pausing {
		m.serving(u)
	}
	a.wg.Go(func() { a.monitor(m, u) })
	if m.still {
		m.life.Lock()
		a.letGoOnLater(m, u)
		m.life.Unlock()
	}
	if pausing {
		a.wg.Go(func() { a.goOn(m, u) })
		return
	}
	a.log.Info("took over running sandbox", "sandbox", m.id, "slot", slot.Index)
}

// goOn undoes the pause of an adopted sandbox that did not get to its end. The
// engine may still be writing the image, which takes as long as it takes: nobody
// else waits for that.
func (a *Agent) goOn(m *managed, u *unit) {
	ctx, cancel := context.WithTimeout(a.ctx, imageLimit)
	defer cancel()
	m.life.Lock()
	defer m.life.Unlock()
	if rec, _, _ := m.status(); rec.State != sandbox.Pausing || m.begin(cancel) != nil {
		return // it is gone, or going
	}
	err := u.inst.Resume(ctx)
	if err != nil {
		select {
		case <-u.inst.Done(): // the monitor tells why
			return
		default:
		}
		if a.ctx.Err() != nil || m.begin(func() {}) != nil {
			return // for the next agent, or for who stops it
		}
		a.log.Warn("sandbox does not go on; it is asked again", "sandbox", m.id, "err", err)
		if a.wasPaused(m) { // its image is whole, and it has done nothing since
			m.unit = nil
			a.release(u)
			return
		}
		a.letGoOnLater(m, u)
	}
	m.serving(u) // first: what runs has an address
	if err := errors.Join(m.setState(sandbox.Running), removeImage(m.imageDir())); err != nil {
		a.log.Warn("undo pause that was cut off", "sandbox", m.id, "err", err) // the next agent comes to the same
	}
	a.log.Info("took over running sandbox", "sandbox", m.id, "slot", u.slot.Index, "was", sandbox.Pausing)
}
