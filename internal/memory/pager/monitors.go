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

// noted is a monitor of the list.
type noted struct {
	process.ID
	ReasonFile string `json:"reason_file,omitempty"`
}

// noteMonitors writes the list again. mu is not held.
func (p *Pager) noteMonitors() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := []noted{}
	for _, a := range p.vms {
		if st := a.status(); st.State != StateEnded && st.Monitor.PID != 0 {
			all = append(all, noted{st.Monitor, st.ReasonFile})
		}
	}
	b, err := json.Marshal(all)
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
	var all []noted
	if err := json.Unmarshal(b, &all); err != nil { // as of a host that has lost power: no monitor is left
		p.log.Warn("the list of monitors is damaged", "err", err)
		return nil
	}
	for _, m := range all {
		h, err := m.Open()
		if errors.Is(err, os.ErrProcessDone) {
			continue
		}
		if err == nil {
			p.log.Warn("ending a virtual machine whose pager was killed", "pid", m.PID)
			err = errors.Join(writeReason(m.ReasonFile, "its pager was killed"), h.Kill())
			h.Close()
		}
		if err != nil {
			return fmt.Errorf("end monitor without a pager: %w", err)
		}
	}
	return nil
}
