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
	"github.com/wrenn/wrenn/internal/sandbox"
)

// adoptAll goes through the journal: what runs is taken over, everything else
// is freed and remembered with its reason. It runs before the slots are opened,
// which then frees every slot that is not in use.
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
	return adopted, g.Wait()
}

// adopt takes over one sandbox, or frees it and returns nil.
func (a *Agent) adopt(ctx context.Context, rec record) (*managed, error) {
	m := newManaged(rec, a.sandboxDir(rec.ID))
	end, reason := sandbox.Failed, "the host agent was restarted while the sandbox was being started"
	switch rec.State {
	case sandbox.Running:
		inst, err := a.cfg.Runtime.Adopt(ctx, rec.ID, rec.RuntimeState)
		switch {
		case err == nil:
			m.inst = inst
			return m, nil
		case errors.Is(err, sandbox.ErrNotFound):
			reason = "the sandbox ended while the host agent was down"
		case errors.Is(err, sandbox.ErrInvalid):
			// It may be running, but nobody would know its end or its network.
			reason = "the host agent's record of it was damaged"
		default:
			return nil, err
		}
	case sandbox.Stopping:
		end, reason = sandbox.Stopped, "it was killed"
	}
	if err := a.cfg.Runtime.Discard(ctx, rec.ID, rec.RuntimeState); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(m.dir); err != nil {
		return nil, err
	}
	a.ended.add(obituary{ID: rec.ID, State: end, Reason: reason, Time: time.Now(), Logs: m.finalLogs(end, reason)}, false)
	a.log.Info("freed what a dead sandbox left", "sandbox", rec.ID, "was", rec.State, "reason", reason)
	return nil, nil
}

// takeOver puts an adopted sandbox under supervision. Its access token is not
// known until the control plane gives it again.
func (a *Agent) takeOver(m *managed) {
	slot, ok := a.slots.Adopted(m.rec.Slot)
	if !ok {
		if err := a.teardown(m, sandbox.Failed, "its network was lost while the host agent was down", false); err != nil {
			a.log.Error("free sandbox without network", "sandbox", m.id, "err", err)
		}
		return
	}
	m.slot = slot
	m.serving(slot.HostAddr, guest.NewClient(slot.HostAddr, ""))
	a.mu.Lock()
	a.sandboxes[m.id] = m
	a.mu.Unlock()
	a.wg.Go(func() { a.monitor(m, m.inst) })
	a.log.Info("took over running sandbox", "sandbox", m.id, "slot", slot.Index)
}
