// Package process holds other processes of the host beyond doubt, children of
// this one or not: they outlive the process that started them. It imports nothing
// of ours.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ID names one host process beyond doubt: pids are used again, a pid together
// with its start time is not before the host boots again.
type ID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`          // in clock ticks since the host booted
	Boot  string `json:"boot,omitempty"` // the kernel's boot_id; empty in what earlier builds noted
}

// boot is the host's boot_id.
var boot = sync.OnceValues(func() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
})

// Identify gives the process that has this pid now. The error is
// os.ErrProcessDone when there is none.
func Identify(pid int) (ID, error) {
	fields, err := readStat(pid)
	if err != nil {
		return ID{}, err
	}
	start, err := strconv.ParseUint(fields[statStart], 10, 64)
	if err != nil {
		return ID{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	id := ID{PID: pid, Start: start}
	if id.Boot, err = boot(); err != nil {
		return ID{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	return id, nil
}

// same reports whether p, as it may have been noted long ago, is the process now.
func (p ID) same(now ID) bool {
	return p.PID == now.PID && p.Start == now.Start && (p.Boot == "" || p.Boot == now.Boot)
}

// Indices into what readStat returns.
const (
	statState    = 0  // "Z" once it has ended and is not yet reaped
	statStart    = 19 // start time
	statExitCode = 49 // wait status; only a process that has ended has one
	statFields   = 50
)

// readStat returns the fields of /proc/PID/stat from the third on. The second is
// the program's name in brackets and may hold anything, brackets too.
func readStat(pid int) ([]string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil, os.ErrProcessDone
	}
	if err != nil {
		return nil, fmt.Errorf("read state of process %d: %w", pid, err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < statFields {
		return nil, fmt.Errorf("read state of process %d: only %d fields", pid, len(fields))
	}
	return fields, nil
}

// Handle holds a process by a pidfd, whether it is a child of ours or not.
type Handle struct {
	ID
	pidfd *os.File
}

// Open takes hold of the process. The error is os.ErrProcessDone when it is gone.
func (p ID) Open() (*Handle, error) {
	if p.PID <= 0 {
		return nil, os.ErrProcessDone
	}
	fd, err := unix.PidfdOpen(p.PID, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) { // EINVAL: the pid is now a thread's
		return nil, os.ErrProcessDone
	}
	if err != nil {
		return nil, fmt.Errorf("open pidfd of %d: %w", p.PID, err)
	}
	h := &Handle{ID: p, pidfd: os.NewFile(uintptr(fd), "pidfd")}
	// Only now is the pid ours for certain, so only now is it compared.
	now, err := Identify(p.PID)
	if err == nil && !p.same(now) {
		err = os.ErrProcessDone
	}
	if err != nil { // also one that says nothing of the process, as where no more files may be open
		h.Close()
		return nil, err
	}
	if h.Ended() { // but not reaped
		h.Close()
		return nil, os.ErrProcessDone
	}
	return h, nil
}

// Close lets go of the process. A Wait under way must have returned.
func (h *Handle) Close() { h.pidfd.Close() }

// Kill ends the process. A process that has ended is no error.
func (h *Handle) Kill() error {
	err := h.control(func(fd int) error { return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) })
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", h.PID, err)
	}
	return nil
}

// Wait returns when the process has ended, or with the error of ctx. It takes no
// thread while it waits. One call at a time.
func (h *Handle) Wait(ctx context.Context) error {
	conn, err := h.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	if err := h.pidfd.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = h.pidfd.SetReadDeadline(time.Now()) })
	defer stop()
	if err := conn.Read(readable); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return err
	}
	return nil
}

// Ended reports whether the process has ended.
func (h *Handle) Ended() bool {
	return h.control(func(fd int) error {
		if !readable(uintptr(fd)) {
			return unix.EAGAIN
		}
		return nil
	}) == nil
}

// readable reports whether a pidfd says that its process has ended.
func readable(fd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}

func (h *Handle) control(f func(fd int) error) error {
	conn, err := h.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := conn.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

// ExitStatus says how an ended process ended, child of ours or not; a child is
// reaped by it. known is false when the host does not tell: its parent was
// faster to reap it and the kernel is older than 6.15.
func (h *Handle) ExitStatus() (ws unix.WaitStatus, known bool) {
	if pid, err := unix.Wait4(h.PID, &ws, unix.WNOHANG, nil); err == nil && pid == h.PID {
		return ws, true
	}
	if fields, err := readStat(h.PID); err == nil && fields[statState] == "Z" && fields[statStart] == strconv.FormatUint(h.Start, 10) {
		if code, err := strconv.ParseUint(fields[statExitCode], 10, 32); err == nil {
			return unix.WaitStatus(code), true
		}
	}
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT} // kept with the pidfd from the reaping on
	err := h.control(func(fd int) error { return unix.IoctlPidfdInfo(fd, &info) })
	if err != nil || info.Mask&unix.PIDFD_INFO_EXIT == 0 {
		return 0, false
	}
	return unix.WaitStatus(info.Exit_code), true
}

// End kills the process, and takes a child of ours off the host's table also when it
// has ended by itself.
func (p ID) End(ctx context.Context) error {
	h, err := p.Open()
	if errors.Is(err, os.ErrProcessDone) {
		if p.PID > 0 {
			_, _ = unix.Wait4(p.PID, nil, unix.WNOHANG, nil)
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer h.Close()
	return h.End(ctx)
}

// End kills the process and returns when it has ended. A child of ours is reaped.
func (h *Handle) End(ctx context.Context) error {
	if err := h.Kill(); err != nil {
		return err
	}
	if err := h.Wait(ctx); err != nil {
		return err
	}
	h.Reap()
	return nil
}

// Reap takes an ended process off the host's table when it is a child of ours, and
// does nothing when it is not.
func (h *Handle) Reap() { _, _ = unix.Wait4(h.PID, nil, unix.WNOHANG, nil) }
