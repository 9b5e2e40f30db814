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
	var errs []error
	for _, m := range all {
		if err := p.endOrphan(m); err != nil {
			errs = append(errs, fmt.Errorf("end monitor without a pager: %w", err))
		}
	}
	return errors.Join(errs...)
}

func (p *Pager) endOrphan(m noted) error {
	h, err := m.Open()
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer h.Close()
	p.log.Warn("ending a virtual machine whose pager was killed", "pid", m.PID)
	if err := writeReason(m.ReasonFile, "its pager was killed"); err != nil { // as on a full disk
		p.log.Error("nobody is told why a virtual machine ends", "err", err)
	}
	return h.Kill()
}
