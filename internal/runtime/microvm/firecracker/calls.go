package firecracker

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

func (c *Client) put(ctx context.Context, path string, in any) error {
	return c.call(ctx, shortTime, http.MethodPut, path, in, nil)
}

func (c *Client) patch(ctx context.Context, path string, in any) error {
	return c.call(ctx, shortTime, http.MethodPatch, path, in, nil)
}

func (c *Client) get(ctx context.Context, path string, out any) error {
	return c.call(ctx, shortTime, http.MethodGet, path, nil, out)
}

// Instance asks in what state the machine is.
func (c *Client) Instance(ctx context.Context) (Instance, error) {
	var i Instance
	err := c.get(ctx, "/", &i)
	return i, err
}

// Version asks which version answers.
func (c *Client) Version(ctx context.Context) (Version, error) {
	var v struct {
		Version string `json:"firecracker_version"`
	}
	if err := c.get(ctx, "/version", &v); err != nil {
		return Version{}, err
	}
	return ParseVersion(v.Version)
}

// SetBootSource sets the kernel. This and the other Set calls come before Start.
func (c *Client) SetBootSource(ctx context.Context, b BootSource) error {
	return c.put(ctx, "/boot-source", b)
}

// SetDrive adds a disk. Disks are found in the guest in the order in which they were
// added, the root device before all others.
func (c *Client) SetDrive(ctx context.Context, d Drive) error {
	return c.put(ctx, "/drives/"+url.PathEscape(d.ID), d)
}

// UpdateDrive changes a disk after the start.
func (c *Client) UpdateDrive(ctx context.Context, d DriveUpdate) error {
	return c.patch(ctx, "/drives/"+url.PathEscape(d.ID), d)
}

// SetNetwork adds a link.
func (c *Client) SetNetwork(ctx context.Context, n NetworkInterface) error {
	return c.put(ctx, "/network-interfaces/"+url.PathEscape(n.ID), n)
}

// UpdateNetwork changes a link's limits after the start.
func (c *Client) UpdateNetwork(ctx context.Context, n NetworkInterfaceUpdate) error {
	return c.patch(ctx, "/network-interfaces/"+url.PathEscape(n.ID), n)
}

// SetMachine sets processors and memory.
func (c *Client) SetMachine(ctx context.Context, m MachineConfig) error {
	return c.put(ctx, "/machine-config", m)
}

// Machine asks for processors and memory.
func (c *Client) Machine(ctx context.Context) (MachineConfig, error) {
	var m MachineConfig
	err := c.get(ctx, "/machine-config", &m)
	return m, err
}

// Config asks for all that is configured.
func (c *Client) Config(ctx context.Context) (json.RawMessage, error) {
	var all json.RawMessage
	err := c.get(ctx, "/vm/config", &all)
	return all, err
}

// SetMMDSConfig sets how the guest gets at its metadata. A snapshot keeps that, and
// not the metadata.
func (c *Client) SetMMDSConfig(ctx context.Context, m MMDSConfig) error {
	return c.put(ctx, "/mmds/config", m)
}

// SetMMDS replaces the metadata, at any time.
func (c *Client) SetMMDS(ctx context.Context, data any) error { return c.put(ctx, "/mmds", data) }

// MMDS asks for the metadata.
func (c *Client) MMDS(ctx context.Context, data any) error { return c.get(ctx, "/mmds", data) }

// SetEntropy adds the entropy device.
func (c *Client) SetEntropy(ctx context.Context, e Entropy) error { return c.put(ctx, "/entropy", e) }

// SetSerial sets where the serial port writes to, where Capabilities has SerialPath.
func (c *Client) SetSerial(ctx context.Context, s Serial) error { return c.put(ctx, "/serial", s) }

// SetVsock adds the vsock device.
func (c *Client) SetVsock(ctx context.Context, v Vsock) error { return c.put(ctx, "/vsock", v) }

// SetBalloon adds the balloon.
func (c *Client) SetBalloon(ctx context.Context, b Balloon) error { return c.put(ctx, "/balloon", b) }

// UpdateBalloon changes its size after the start.
func (c *Client) UpdateBalloon(ctx context.Context, b BalloonUpdate) error {
	return c.patch(ctx, "/balloon", b)
}

// BalloonStats asks what the guest says of its memory.
func (c *Client) BalloonStats(ctx context.Context) (BalloonStats, error) {
	var s BalloonStats
	err := c.get(ctx, "/balloon/statistics", &s)
	return s, err
}

// hinting refuses what a version cannot do.
func (c *Client) hinting(can Capabilities) error {
	if !can.BalloonHinting {
		return sandbox.Errorf(sandbox.ErrInvalid, "a guest cannot tell Firecracker %s which pages are free: install 1.14 or newer", can.Version)
	}
	return nil
}

// StartHinting asks the guest to tell which of its pages are free, which the host then
// takes back. With acknowledge it may have them again once it has told all; without,
// at StopHinting. The balloon must have been set with Hinting.
func (c *Client) StartHinting(ctx context.Context, can Capabilities, acknowledge bool) error {
	if err := c.hinting(can); err != nil {
		return err
	}
	return c.patch(ctx, "/balloon/hinting/start", map[string]bool{"acknowledge_on_stop": acknowledge})
}

// StopHinting ends that: the guest may have its pages again.
func (c *Client) StopHinting(ctx context.Context, can Capabilities) error {
	if err := c.hinting(can); err != nil {
		return err
	}
	return c.patch(ctx, "/balloon/hinting/stop", nil)
}

// Hinting asks how far the guest is.
func (c *Client) Hinting(ctx context.Context, can Capabilities) (HintingStatus, error) {
	var s HintingStatus
	if err := c.hinting(can); err != nil {
		return s, err
	}
	err := c.get(ctx, "/balloon/hinting/status", &s)
	return s, err
}

// SetCPU sets what of the host's processors the machine sees.
func (c *Client) SetCPU(ctx context.Context, can Capabilities, cpu CPUConfig) error {
	if !can.CPUConfig {
		return sandbox.Errorf(sandbox.ErrInvalid, "Firecracker %s has no processors but the host's: install a newer one", can.Version)
	}
	return c.put(ctx, "/cpu-config", cpu)
}

// SetLogger sets where Firecracker's own words go.
func (c *Client) SetLogger(ctx context.Context, l Logger) error { return c.put(ctx, "/logger", l) }

// SetMetrics sets where Firecracker's counters go.
func (c *Client) SetMetrics(ctx context.Context, m Metrics) error { return c.put(ctx, "/metrics", m) }

func (c *Client) action(ctx context.Context, limit time.Duration, name string) error {
	return c.call(ctx, limit, http.MethodPut, "/actions", map[string]string{"action_type": name}, nil)
}

// Start boots the machine.
func (c *Client) Start(ctx context.Context) error { return c.action(ctx, startTime, "InstanceStart") }

// CtrlAltDel asks the guest to restart, by which Firecracker ends.
func (c *Client) CtrlAltDel(ctx context.Context) error {
	return c.action(ctx, shortTime, "SendCtrlAltDel")
}

// FlushMetrics writes the counters.
func (c *Client) FlushMetrics(ctx context.Context) error {
	return c.action(ctx, shortTime, "FlushMetrics")
}

func (c *Client) state(ctx context.Context, state string) error {
	return c.call(ctx, startTime, http.MethodPatch, "/vm", map[string]string{"state": state}, nil)
}

// Pause stops the processors. It may be repeated.
func (c *Client) Pause(ctx context.Context) error { return c.state(ctx, "Paused") }

// Resume lets them go on. It may be repeated.
func (c *Client) Resume(ctx context.Context) error { return c.state(ctx, "Resumed") }

// CreateSnapshot writes a snapshot of a paused machine with this much memory.
func (c *Client) CreateSnapshot(ctx context.Context, s SnapshotCreate, memoryMiB int64) error {
	return c.call(ctx, memoryTime(memoryMiB), http.MethodPut, "/snapshot/create", s, nil)
}

// snapshotLoad is SnapshotLoad in Firecracker's words. Fields that a version does not
// know make it refuse the whole call.
type snapshotLoad struct {
	State         string            `json:"snapshot_path"`
	Memory        MemoryBackend     `json:"mem_backend"`
	TrackDirty    bool              `json:"track_dirty_pages,omitempty"`
	EnableDiff    bool              `json:"enable_diff_snapshots,omitempty"` // the same, in old versions
	Resume        bool              `json:"resume_vm"`
	Networks      []NetworkOverride `json:"network_overrides,omitempty"`
	Vsock         *VsockOverride    `json:"vsock_override,omitempty"`
	ClockRealtime bool              `json:"clock_realtime,omitempty"`
}

// Load loads a snapshot of a machine with this much memory into a Firecracker that
// has been configured for nothing. When it fails, Firecracker is of no more use.
func (c *Client) Load(ctx context.Context, can Capabilities, s SnapshotLoad, memoryMiB int64) error {
	missing := ""
	switch {
	case len(s.Networks) > 0 && !can.NetworkOverrides:
		missing = "another TAP"
	case s.Vsock != nil && !can.VsockOverride:
		missing = "another vsock socket"
	case s.ClockRealtime && !can.ClockRealtime:
		missing = "a clock that is set forward"
	}
	if missing != "" {
		return sandbox.Errorf(sandbox.ErrInvalid, "Firecracker %s cannot load a snapshot with %s: install a newer one", can.Version, missing)
	}
	in := snapshotLoad{
		State: s.State, Memory: s.Memory, Resume: s.Resume, Networks: s.Networks, Vsock: s.Vsock, ClockRealtime: s.ClockRealtime,
		TrackDirty: s.TrackDirty && can.TrackDirtyAtLoad, EnableDiff: s.TrackDirty && !can.TrackDirtyAtLoad,
	}
	return c.call(ctx, memoryTime(memoryMiB), http.MethodPut, "/snapshot/load", in, nil)
}
