package pager

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/wrenn/wrenn/internal/process"
)

// monitorsFile is beside the socket and lists the monitors that are served, so that
// the next pager can end those whose pager was killed: they hang.
func monitorsFile(socket string) string { return socket + ".monitors" }

// noteMonitors writes the list again. mu is not held.
func (p *Pager) noteMonitors() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	ids := []process.ID{}
	for _, a := range p.vms {
		if st := a.status(); st.State != StateEnded && st.Monitor.PID != 0 {
			ids = append(ids, st.Monitor)
		}
	}
	b, err := json.Marshal(ids)
	if err != nil {
		return fmt.Errorf("note monitors: %w", err)
	}
	// Not synced: no monitor outlives the host.
	tmp := monitorsFile(p.socket) + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("note monitors: %w", err)
	}
	if err := os.Rename(tmp, monitorsFile(p.socket)); err != nil {
		return fmt.Errorf("note monitors: %w", err)
	}
	return nil
}

// endOrphans ends the monitors that a pager before this one has served.
func (p *Pager) endOrphans() error {
	b, err := os.ReadFile(monitorsFile(p.socket))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find monitors without a pager: %w", err)
	}
	var ids []process.ID
	if err := json.Unmarshal(b, &ids); err != nil {
		return fmt.Errorf("find monitors without a pager: %w", err)
	}
	for _, id := range ids {
		h, err := id.Open()
		if errors.Is(err, os.ErrProcessDone) {
			continue
		}
		if err == nil {
			p.log.Warn("ending a virtual machine whose pager was killed", "pid", id.PID)
			err = h.Kill()
			h.Close()
		}
		if err != nil {
			return fmt.Errorf("end monitor without a pager: %w", err)
		}
	}
	return nil
}
