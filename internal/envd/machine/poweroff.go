package machine

import (
	"errors"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// How long the way down may take.
const (
	termLimit = 10 * time.Second // for programs to end when asked
	killLimit = 5 * time.Second  // to end when killed; what is stuck in the kernel stays
	syncLimit = 60 * time.Second // for the disk
)

// PowerOff ends every process, writes everything to disk and ends the machine.
// The agent must have stopped serving: from here on its children are waited for
// here. It returns only when the kernel refuses to end the machine.
func (m *Machine) PowerOff() error {
	m.off()
	endAll(termLimit, killLimit)
	within(syncLimit, func() {
		unix.Sync()
		unmountAll()
		unix.Sync()
	})
	how := unix.LINUX_REBOOT_CMD_POWER_OFF
	if m.params.Restart {
		how = unix.LINUX_REBOOT_CMD_RESTART
	}
	return unix.Reboot(how)
}

// endAll asks all processes to end, and kills those that do not.
func endAll(term, kill time.Duration) {
	// For the first process these reach all others. Those that are stopped have to
	// run to hear of it.
	_ = syscall.Kill(-1, syscall.SIGTERM)
	_ = syscall.Kill(-1, syscall.SIGCONT)
	if waitForAll(term) {
		return
	}
	_ = syscall.Kill(-1, syscall.SIGKILL)
	waitForAll(kill)
}

// waitForAll reaps until no process is left: all are children of the first one,
// or become it when their parents end.
func waitForAll(limit time.Duration) bool {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGCHLD)
	defer signal.Stop(ended)
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		for {
			pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
			if errors.Is(err, syscall.ECHILD) {
				return true
			}
			if err == nil && pid == 0 {
				break // some run still
			}
		}
		select {
		case <-ended:
		case <-timer.C:
			return false
		}
	}
}

// unmountAll leaves no filesystem that would have to be repaired.
func unmountAll() {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return
	}
	for _, path := range mountedBelow(string(info)) {
		// What is still in use can be made read-only at least.
		if unix.Unmount(path, 0) != nil {
			_ = unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
		}
	}
	_ = unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
}

// within runs f, and waits no longer than limit for its end.
func within(limit time.Duration, f func()) {
	done := make(chan struct{})
	go func() { // what hangs here hangs in the kernel, and ends with the machine
		defer close(done)
		f()
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	}
}
