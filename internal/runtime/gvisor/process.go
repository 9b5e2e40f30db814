package gvisor

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"time"

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
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return process{}, os.ErrProcessDone
	}
	if err != nil {
		return process{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	// The second field is the program's name in brackets and may hold anything;
	// the start time is the 22nd field, so the 20th after the last bracket.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return process{}, fmt.Errorf("identify process %d: stat has %d fields", pid, len(fields)+2)
	}
	start, err := strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return process{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	return process{PID: pid, Start: start}, nil
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
// handle was closed or its deadline has passed. It takes no thread while it waits.
func (h *handle) wait() error { return h.poll(unix.POLLIN) }

func (h *handle) poll(events int16) error {
	conn, err := h.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
		n, err := unix.Poll(fds, 0)
		return err == nil && n > 0 && fds[0].Revents&(events|unix.POLLERR) != 0
	})
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

// reapTime is how long the exit status may stay with a parent that is slow to
// collect it.
const reapTime = 200 * time.Millisecond

// exitStatus says how an ended process ended; known is false when the host
// cannot tell (it is no child of ours and the kernel is older than 6.15). A
// child of ours is reaped by it.
func (h *handle) exitStatus() (ws unix.WaitStatus, known bool) {
	if pid, err := unix.Wait4(h.PID, &ws, unix.WNOHANG, nil); err == nil && pid == h.PID {
		return ws, true
	}
	// The kernel keeps the status with the pidfd once the parent, here the
	// host's init, has collected it.
	h.pidfd.SetReadDeadline(time.Now().Add(reapTime))
	h.poll(unix.POLLHUP)
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	err := h.control(func(fd int) error { return unix.IoctlPidfdInfo(fd, &info) })
	if err != nil || info.Mask&unix.PIDFD_INFO_EXIT == 0 {
		return 0, false
	}
	return unix.WaitStatus(info.Exit_code), true
}
