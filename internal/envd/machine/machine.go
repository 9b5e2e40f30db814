// Package machine is what the guest agent does as the first process of a virtual
// machine: mounts, names, network, signals, and the way down. In a container
// engine's sandbox the engine has done all that and nothing of this is used.
package machine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// searchPath is what programs are searched in.
const searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Machine is the virtual machine whose pid 1 this process is.
type Machine struct {
	params   Params
	log      *slog.Logger
	problems []error

	off     context.CancelFunc
	stopped context.Context // ends when somebody asks for the machine's end

	mu      sync.Mutex // of the names
	named   string     // the hostname given last, by us
	aliases []Alias
}

// Boot makes a running system of a kernel that has just started its first
// process. What fails is kept for Problems: an agent that answers can be asked
// what is wrong, one that gives up cannot.
func Boot() *Machine {
	m := &Machine{}
	m.stopped, m.off = context.WithCancel(context.Background())
	m.try("prepare process", ownProcess())
	for _, err := range mountAll("/") {
		m.try("mount", err)
	}
	m.log = slog.New(slog.NewTextHandler(OpenConsole("/dev/console"), nil))
	own := m.watchSignals()
	m.params = readParams("/proc/cmdline")
	for _, err := range m.params.invalid {
		m.try("read parameter", err)
	}
	for _, err := range setSysctls("/proc/sys") {
		m.try("set sysctl", err)
	}
	if own {
		m.try("set up memory", keepWorkingSet("/sys"))
	}
	m.try("set hostname", m.setName(m.params.Hostname))
	m.try("write resolver", writeResolver("/etc/resolv.conf", m.params.Resolvers))
	m.try("set up network", configure(m.params))
	for _, err := range m.problems {
		m.log.Warn(err.Error())
	}
	return m
}

func (m *Machine) try(what string, err error) {
	if err != nil {
		m.problems = append(m.problems, fmt.Errorf("%s: %w", what, err))
	}
}

// Log is for what the host's operator has to see: it goes to the console.
func (m *Machine) Log() *slog.Logger { return m.log }

// Problems returns what did not work at boot.
func (m *Machine) Problems() []error { return m.problems }

// Params returns what the kernel's command line says.
func (m *Machine) Params() Params { return m.params }

// Resumed repairs what may have changed under the machine, its network, and closes the
// connections that were open before, but for the one whose other end is asker. It
// changes nothing else that is as it should be.
func (m *Machine) Resumed(asker netip.AddrPort) error {
	if !configured(m.params) {
		if err := configure(m.params); err != nil {
			return fmt.Errorf("set up network: %w", err)
		}
	}
	return m.closeConnections(asker)
}

// Stopped ends when somebody has asked for the machine's end.
func (m *Machine) Stopped() context.Context { return m.stopped }

// Stop asks for the machine's end: whoever called Boot then calls PowerOff.
func (m *Machine) Stop() { m.off() }

// watchSignals takes every signal away from Go's defaults, which would end the
// process, and with it the machine, for a hang-up. The signals by which init is
// asked to power off, ctrl-alt-del among them, do that. own says whether the kernel
// is this process's own, and not a namespace's.
func (m *Machine) watchSignals() (own bool) {
	// Nobody reads these: what is sent is dropped. Ignoring signals
	// instead would be inherited by every program.
	signal.Notify(make(chan os.Signal, 1))
	requests := make(chan os.Signal, 1)
	signal.Notify(requests, syscall.SIGTERM, syscall.SIGINT, syscall.SIGPWR)
	go func() { // ends with the machine
		m.log.Info("powering off", "signal", (<-requests).String())
		m.off()
	}()
	// Without this the kernel resets the machine on ctrl-alt-del itself. Only the
	// machine's own first process may say so, and not one of a namespace.
	return unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF) == nil
}

// ownProcess gives this process, and so all others, what a login would find: the
// kernel leaves words of its command line in the environment, and limits that
// programs of today run into.
func ownProcess() error {
	os.Clearenv()
	syscall.Umask(0o022)
	return errors.Join(limitFiles(65_536, 1_048_576), os.Setenv("PATH", searchPath), os.Setenv("HOME", "/root"), os.Chdir("/"))
}

// limitFiles sets how many files a process may open, and up to how many it may
// raise that itself.
func limitFiles(soft, hard uint64) error {
	err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: soft, Max: hard})
	if !errors.Is(err, syscall.EPERM) {
		return err
	}
	// The limit was lower, and this process may not raise it.
	var now syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &now); err != nil {
		return err
	}
	return syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: min(soft, now.Max), Max: now.Max})
}
