package microvm

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/wrenn/wrenn/internal/cgroup"
	"github.com/wrenn/wrenn/internal/process"
	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// A Monitor is a program that runs one virtual machine in one process of its own,
// and how it is driven. It keeps nothing of a machine in memory: an agent that was
// started anew drives the machines of the one before. It is safe for concurrent use,
// one call at a time for each machine.
type Monitor interface {
	// Name is the name of the runtime that it makes: "firecracker", "qemu".
	Name() string

	// Version identifies the monitor and what else an image of memory depends on:
	// one made under another version does not load.
	Version() string

	// Probe says by a functional test whether the monitor can boot the kernel here.
	// The error says what is missing and what to do about it.
	Probe(ctx context.Context, k kernel.Kernel) error

	// Boot starts the monitor in its jail with the machine in it, and returns the
	// monitor's process once the machine runs. When it fails it returns the process, if
	// there was one; the caller ends what
	// is in the machine's cgroup and removes what is in its directory.
	Boot(ctx context.Context, m Machine) (process.ID, error)

	// Load starts the monitor with the machine as Save left it in the directory
	// saved, paused. What the machine needs of that directory later, it links into
	// its own. A state that does not load is sandbox.ErrInvalid.
	Load(ctx context.Context, m Machine, saved string) (process.ID, error)

	// Pause stops the machine's processors, and Resume lets them go on. Both may be
	// repeated.
	Pause(ctx context.Context, m Machine) error
	Resume(ctx context.Context, m Machine) error

	// Identify says to a guest that asks which sandbox of which template it is.
	Identify(ctx context.Context, m Machine, sandboxID, templateID string) error

	// Save writes what a paused machine has in its devices and its memory into the
	// directory to. The machine stays paused. A full disk is sandbox.ErrExhausted.
	Save(ctx context.Context, m Machine, to string) error

	// Spare is what the monitor's processes may take besides the machine's memory, in
	// MiB; loaded says that it comes from an image.
	Spare(m Machine, loaded bool) int64

	// Watch keeps running what machines need besides their monitors, and returns when
	// ctx has ended, without ending any of it. A runtime calls it once.
	Watch(ctx context.Context, log *slog.Logger)

	// Ended is told that a machine of this id is no more, however far it came, so
	// that what is kept of it outside its directory is dropped. It may be repeated.
	Ended(ctx context.Context, id sandbox.ID) error
}

// Machine is a virtual machine, as far as its monitor has to know it.
type Machine struct {
	ID        sandbox.ID   `json:"id"`
	Dir       string       `json:"dir"` // the instance's own directory
	UID       uint32       `json:"uid"` // user that the monitor is, the owner of what it may write
	Group     string       `json:"group"`
	NetNS     string       `json:"netns"`
	TAP       string       `json:"tap"` // in that network namespace
	MAC       string       `json:"mac"`
	CPUs      int          `json:"cpus"`
	MemoryMiB int64        `json:"memoryMiB"` // of the machine, its kernel included
	Kernel    string       `json:"kernel"`    // paths on the host
	Initramfs string       `json:"initramfs"`
	CmdLine   string       `json:"cmdline"`
	Agent     string       `json:"agent"`   // disk with the guest agent, read-only: /dev/vdb
	PID       process.ID   `json:"process"` // of the monitor, once there is one
	Cgroups   cgroup.Trees `json:"-"`
}

// Disk is the machine's root disk: /dev/vda.
func (m Machine) Disk() string { return filepath.Join(m.Dir, diskFile) }

// Run is the directory that the monitor may write to: sockets, and the console.
func (m Machine) Run() string { return filepath.Join(m.Dir, "run") }

// Console is where the monitor writes what the machine's serial port says: a pipe
// with a name, so that it takes no more than the kernel's buffer when nobody reads.
func (m Machine) Console() string { return filepath.Join(m.Run(), ConsoleName+".out") }

// consoleInput is what the serial port reads, of a monitor that lets it read: a pipe
// that nobody writes to.
func (m Machine) consoleInput() string { return filepath.Join(m.Run(), ConsoleName+".in") }

// ConsoleLog is the end of what the machine has said.
func (m Machine) ConsoleLog() string { return filepath.Join(m.Dir, "console.log") }

// Jail is an empty directory for the monitor's root directory to be mounted on.
func (m Machine) Jail() string { return filepath.Join(m.Dir, "jail") }

// Reason is a file that says why the machine was ended by another process than the
// agent's, which writes it before; the monitor cannot.
func (m Machine) Reason() string { return filepath.Join(m.Dir, "reason") }

// EndReason is what Reason says; empty: nothing.
func EndReason(m Machine) string {
	f, err := os.Open(m.Reason())
	if err != nil {
		return ""
	}
	defer f.Close()
	const longest = 4 << 10
	why, err := io.ReadAll(io.LimitReader(f, longest))
	if err != nil {
		return ""
	}
	return string(why)
}

// Base is the directory in which the machine keeps what it needs of the image it
// was loaded from: the layers that the next image of its memory refers to.
func (m Machine) Base() string { return filepath.Join(m.Dir, "base") }

// Files of an instance's directory, and of an image's.
const (
	diskFile  = "root.ext4" // in both
	imageFile = "machine.json"
	// WorkingSet says which memory was touched first after a resume: in a machine's base
	// and in an image. Nothing but speed depends on it.
	WorkingSet = "workingset"
)

// ConsoleName is what QEMU calls the pair of a machine's pipes: for want of one of
// them it reads what it has written itself.
const ConsoleName = "console"

// The monitor makes no other files directly in Dir than these, so that what is left
// of an instance can be removed without knowing more of it.
var instanceFiles = []string{diskFile, "run", "jail", "base", "console.log", "reason"}
