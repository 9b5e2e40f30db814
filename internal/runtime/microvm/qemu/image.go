package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/memory"
	"github.com/wrenn/wrenn/internal/process"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// maxState bounds the state of the devices: some tens of KiB.
const maxState = 16 << 20

// Load implements microvm.Monitor.
func (q *Monitor) Load(ctx context.Context, m microvm.Machine, saved string) (id process.ID, err error) {
	state, err := openState(saved)
	if err != nil {
		return id, err
	}
	defer state.Close()
	image, err := openMemory(saved, m)
	if err != nil {
		return id, err
	}
	defer image.Close()
	if err := image.LinkTo(m.Base()); err != nil {
		return id, err
	}
	ram, err := q.memories.get(ctx, saved, image)
	if err != nil {
		return id, damaged(err)
	}
	defer q.memories.put(ram)
	id, err = q.start(ctx, m, ram.file, state)
	if err != nil {
		return id, err
	}
	if err := q.load(ctx, m); err != nil {
		return id, q.explain(m, err)
	}
	return id, nil
}

// openMemory opens the memory of an image of machine m.
func openMemory(dir string, m microvm.Machine) (*memory.Image, error) {
	image, err := memory.Open(dir)
	if err != nil {
		return nil, damaged(err)
	}
	if image.Size() != m.MemoryMiB<<20 {
		image.Close()
		return nil, sandbox.Errorf(sandbox.ErrInvalid, "the image is damaged: its memory has %d bytes and its machine %d MiB", image.Size(), m.MemoryMiB)
	}
	return image, nil
}

// damaged gives an error about what is in an image its kind.
func damaged(err error) error {
	if errors.Is(err, memory.ErrDamaged) || errors.Is(err, os.ErrNotExist) {
		return &sandbox.Error{Kind: sandbox.ErrInvalid, Message: "the image is damaged: its memory is not what was written", Cause: err}
	}
	return err
}

// load has QEMU read the state of the devices, and waits until it has.
func (q *Monitor) load(ctx context.Context, m microvm.Machine) error {
	c, err := dial(ctx, m.Run(), socketName)
	if err != nil {
		return err
	}
	defer c.close()
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	if err := c.do(ctx, "migrate-set-capabilities", map[string]any{"capabilities": []capability{{"events", true}}}, nil); err != nil {
		return err
	}
	const stateFD = 5 // behind the socket and the memory
	if err := c.do(ctx, "migrate-incoming", map[string]any{"uri": fmt.Sprintf("fd:%d", stateFD)}, nil); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	var status struct{ Status string }
	err = c.await(ctx, func(e event) bool {
		if e.Event != "MIGRATION" || json.Unmarshal(e.Data, &status) != nil {
			return false
		}
		return status.Status == "completed" || status.Status == "failed"
	})
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("load the state of the devices: %w", err)
	case err != nil || status.Status == "failed": // QEMU ends then
		return &sandbox.Error{Kind: sandbox.ErrInvalid, Message: "the image is damaged: its devices cannot be loaded", Cause: err}
	}
	return nil
}

// Spare implements microvm.Monitor. Where a machine's image has zeroes, the file that
// its memory is mapped from has a hole; the kernel fills that on the first touch, and
// counts it to who touches, beside the machine's own page.
func (*Monitor) Spare(m microvm.Machine, loaded bool) int64 {
	spare := microvm.Spare(m)
	if loaded {
		spare += m.MemoryMiB
	}
	return spare
}

// Watch implements microvm.Monitor: a machine needs nothing else.
func (*Monitor) Watch(context.Context, *slog.Logger) {}

// Ended implements microvm.Monitor: all of a machine is in its directory.
func (*Monitor) Ended(context.Context, sandbox.ID) error { return nil }

// Save implements microvm.Monitor.
func (q *Monitor) Save(ctx context.Context, m microvm.Machine, to string) error {
	c, err := dial(ctx, m.Run(), socketName)
	if err != nil {
		return err
	}
	defer c.close()
	state, err := deviceState(ctx, c)
	if err != nil {
		return err
	}
	if err := saveState(filepath.Join(to, stateName), state); err != nil {
		return err
	}
	address, err := ramAddress(ctx, c)
	if err != nil {
		return err
	}
	var parent *memory.Image
	if _, err := os.Stat(m.Base()); err == nil {
		if parent, err = memory.Open(m.Base()); err != nil {
			return err
		}
		defer parent.Close()
	}
	size := m.MemoryMiB << 20
	if err := memory.Write(ctx, to, size, parent, memory.ProcessMemory{PID: m.PID.PID, Segments: []memory.Segment{
		{Address: address, Range: memory.Range{Length: size}},
	}}); err != nil {
		return err
	}
	// An agent that was started meanwhile may have let the machine go on.
	var status struct{ Running bool }
	if err := c.do(ctx, "query-status", nil, &status); err != nil {
		return err
	}
	if status.Running {
		return sandbox.Errorf(sandbox.ErrConflict, "the sandbox was resumed while its image was taken")
	}
	return nil
}

// ramAddress asks where in QEMU the machine's memory begins.
func ramAddress(ctx context.Context, c *qmp) (uintptr, error) {
	var answer string
	if err := c.do(ctx, "human-monitor-command", map[string]any{"command-line": "gpa2hva 0"}, &answer); err != nil {
		return 0, err
	}
	// Host virtual address for 0x0 (ram) is 0x7f1234500000
	_, text, ok := strings.Cut(strings.TrimSpace(answer), " is 0x")
	address, err := strconv.ParseUint(text, 16, 64)
	if !ok || err != nil {
		return 0, fmt.Errorf("qemu does not say where its memory is: %q", answer)
	}
	return uintptr(address), nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// deviceState is the state of the devices. QEMU writes it to a file in memory: it would
// not say of a full disk that this is what failed. What it writes counts as its own
// memory.
func deviceState(ctx context.Context, c *qmp) ([]byte, error) {
	f, err := memfd(stateName)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// QEMU takes a file that is open for writing and for nothing else.
	w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("open file in memory: %w", err)
	}
	defer w.Close()
	path, err := c.lend(ctx, w)
	if err != nil {
		return nil, err
	}
	if err := c.long(ctx, "xen-save-devices-state", map[string]any{"filename": path}, nil); err != nil {
		return nil, err
	}
	state, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err != nil {
		return nil, fmt.Errorf("read the state of the devices: %w", err)
	}
	if len(state) == 0 || len(state) > maxState {
		return nil, fmt.Errorf("qemu wrote %d bytes of its devices' state", len(state))
	}
	return state, nil
}

// saveState writes the state of the devices, with a checksum of it behind. When it
// fails, nothing is left.
func saveState(to string, state []byte) error {
	sum := crc32.Checksum(state, castagnoli)
	if err := os.WriteFile(to, fmt.Appendf(state, "%08x", sum), 0o600); err != nil {
		return fmt.Errorf("write the state of the devices: %w", errors.Join(disk.Full(err), os.RemoveAll(to)))
	}
	return nil
}

// openState opens the state of the devices for QEMU to read, once it is known to be
// what was written.
func openState(dir string) (*os.File, error) {
	data, err := os.ReadFile(filepath.Join(dir, stateName))
	if errors.Is(err, os.ErrNotExist) {
		return nil, sandbox.Errorf(sandbox.ErrInvalid, "the image is damaged: it has no devices")
	}
	if err != nil {
		return nil, err
	}
	n := len(data) - 8
	if n <= 0 || fmt.Sprintf("%08x", crc32.Checksum(data[:n], castagnoli)) != string(data[n:]) {
		return nil, sandbox.Errorf(sandbox.ErrInvalid, "the image is damaged: the state of its devices is not what was written")
	}
	f, err := memfd("devices")
	if err != nil {
		return nil, err
	}
	if _, err := f.WriteAt(data[:n], 0); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
