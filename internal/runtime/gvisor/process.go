package gvisor

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// process names one host process beyond doubt: pids are used again, a pid
// together with its start time is not.
type process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // in clock ticks since the host booted
}

// identify gives the process that has this pid now. The error is
// os.ErrProcessDone when there is none.
func identify(pid int) (process, error) {
	fields, err := readStat(pid)
	if err != nil {
		return process{}, err
	}
	start, err := strconv.ParseUint(fields[statStart], 10, 64)
	if err != nil {
		return process{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	return process{PID: pid, Start: start}, nil
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

// handle holds a process by a pidfd, whether it is a child of ours or not.
type handle struct {
	process
	pidfd *os.File
}

// open takes hold of the process. The error is os.ErrProcessDone when it is gone.
func (p process) open() (*handle, error) {
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
	h := &handle{process: p, pidfd: os.NewFile(uintptr(fd), "pidfd")}
	// Only now is the pid ours for certain, so only now is it compared.
	if now, err := identify(p.PID); err != nil || now != p {
		h.close()
		return nil, os.ErrProcessDone
	}
	if h.ended() { // but not reaped
		h.close()
		return nil, os.ErrProcessDone
	}
	return h, nil
}

func (h *handle) close() { h.pidfd.Close() }

// kill ends the process. A process that has ended is no error.
func (h *handle) kill() error {
	err := h.control(func(fd int) error { return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) })
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", h.PID, err)
	}
	return nil
}

// wait returns when the process has ended (nil) or, with an error, when the
// handle's deadline has passed. It takes no thread while it waits.
func (h *handle) wait() error {
	conn, err := h.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Read(readable)
}

// ended reports whether the process has ended.
func (h *handle) ended() bool {
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

func (h *handle) control(f func(fd int) error) error {
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

// exitStatus says how an ended process ended, child of ours or not; a child is
// reaped by it. known is false when the host does not tell: its parent was
// faster to reap it and the kernel is older than 6.15.
func (h *handle) exitStatus() (ws unix.WaitStatus, known bool) {
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
