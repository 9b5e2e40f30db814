package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/server/tlscert"
)

const (
	defaultDataDir = "/var/lib/wrenn"
	defaultListen  = "localhost:7080"
)

// dataDir gives the paths of docs/architecture.md, "The data directory".
type dataDir string

func (d dataDir) lock() string        { return filepath.Join(string(d), "lock") }
func (d dataDir) database() string    { return filepath.Join(string(d), "wrenn.db") }
func (d dataDir) credentials() string { return filepath.Join(string(d), "credentials.json") }
func (d dataDir) masterKey() string   { return filepath.Join(string(d), "keys", "master") }
func (d dataDir) acme() string        { return filepath.Join(string(d), "acme") }
func (d dataDir) templates() string   { return filepath.Join(string(d), "templates") }
func (d dataDir) kernels() string     { return filepath.Join(string(d), "kernels") }
func (d dataDir) disks() string       { return filepath.Join(string(d), "disks.xfs") }
func (d dataDir) agent() string       { return filepath.Join(string(d), "agent") }
func (d dataDir) socket() string      { return filepath.Join(d.agent(), "agent.sock") }
func (d dataDir) pagerSocket() string { return filepath.Join(d.agent(), "pager.sock") }
func (d dataDir) pagerLog() string    { return filepath.Join(string(d), "log", "pager.log") }
func (d dataDir) runsc() string       { return filepath.Join(d.agent(), "runsc") }
func (d dataDir) sandboxes() string   { return filepath.Join(d.agent(), "sandboxes") }
func (d dataDir) log() string         { return filepath.Join(string(d), "log", "wrenn.log") }
func (d dataDir) accessLog() string   { return filepath.Join(string(d), "log", "access.log") }

// authority is the machine's own certificate authority.
func (d dataDir) authority() tlscert.Files {
	return tlscert.Files{
		Private: filepath.Join(string(d), "keys", "ca.pem"),
		Public:  filepath.Join(string(d), "ca.pem"),
	}
}

// tag tells the host-wide things of this data directory from those of others.
func (d dataDir) tag() string {
	h := fnv.New32a()
	io.WriteString(h, string(d))
	return fmt.Sprintf("%04x", h.Sum32()&0xffff)
}

// dialAgent connects to the host agent of another process. A socket's path has
// room for 107 bytes, and a data directory may be longer: so it goes by way of a
// descriptor.
func (d dataDir) dialAgent(ctx context.Context, _, _ string) (net.Conn, error) {
	var conn net.Conn
	err := d.nearSocket(func(path string) (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, "unix", path)
		return err
	})
	return conn, err
}

// listenAgent opens that socket; what a killed agent left there goes. The caller
// has the agent's lock.
func (d dataDir) listenAgent() (net.Listener, error) {
	if err := os.Remove(d.socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove stale socket: %w", err)
	}
	var ln net.Listener
	err := d.nearSocket(func(path string) (err error) {
		ln, err = net.Listen("unix", path)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen for the control plane: %w", err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false) // its path is only good now
	if err := os.Chmod(d.socket(), 0o600); err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return ln, nil
}

// nearSocket calls f with a short path of the agent's socket.
func (d dataDir) nearSocket(f func(path string) error) error {
	dir, err := os.Open(d.agent())
	if err != nil {
		return err
	}
	defer dir.Close()
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(d.socket())))
}

// openDataDir makes the directory and returns it by its one true name.
func openDataDir(path string) (dataDir, error) {
	abs, err := filepath.Abs(path)
	if err == nil {
		err = os.MkdirAll(abs, 0o755)
	}
	if err == nil {
		abs, err = filepath.EvalSymlinks(abs)
	}
	if err != nil {
		return "", fmt.Errorf("open data directory (choose another with --data): %w", err)
	}
	if strings.ContainsAny(abs, "*?[\\\n") || !utf8.ValidString(abs) {
		// The sandbox kernel, as we do, looks for files in it by patterns, and both
		// write paths into JSON.
		return "", fmt.Errorf("the data directory's name %q has one of * ? [ \\ or a line break in it, or is not UTF-8: choose another with --data", abs)
	}
	return dataDir(abs), nil
}

// runningPlatform is what a platform says of itself in its lock file.
type runningPlatform struct {
	PID     int       `json:"pid"`
	Program string    `json:"program"` // tells one build of wrenn from another
	Options upOptions `json:"options"`
	Started time.Time `json:"started"`
	Ready   bool      `json:"ready"`
	APIURL  string    `json:"api_url"`
}

// instanceLock makes one process the platform of a data directory. The kernel
// releases it when the process dies, however it dies.
type instanceLock struct{ file *os.File }

var errLocked = errors.New("another platform is running on this data directory")

// acquireLock takes the lock, or gives errLocked.
func acquireLock(d dataDir) (*instanceLock, error) {
	f, err := os.OpenFile(d.lock(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	if err != nil {
		f.Close()
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return nil, errLocked
		}
		return nil, fmt.Errorf("take lock: %w", err)
	}
	return &instanceLock{f}, nil
}

// locked asks whether somebody has the lock, without disturbing who takes it.
func locked(d dataDir) (bool, error) {
	f, err := os.Open(d.lock())
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open lock: %w", err)
	}
	defer f.Close()
	query := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &query); err != nil {
		return false, fmt.Errorf("query lock: %w", err)
	}
	return query.Type != unix.F_UNLCK, nil
}

// describe replaces what the lock file says.
func (l *instanceLock) describe(r runningPlatform) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode lock: %w", err)
	}
	if _, err := l.file.WriteAt(append(data, '\n'), 0); err != nil {
		return fmt.Errorf("write lock: %w", err)
	}
	return l.file.Truncate(int64(len(data)) + 1)
}

func (l *instanceLock) release() { l.file.Close() }

// findRunning returns what the platform of d says of itself, and false when
// none is running.
func findRunning(ctx context.Context, d dataDir) (runningPlatform, bool, error) {
	ctx, cancel := context.WithTimeout(ctx, introductionLimit)
	defer cancel()
	for {
		held, err := locked(d)
		if err != nil || !held {
			return runningPlatform{}, false, err
		}
		// What is read may be half written, or of a platform that ran before: the
		// one that has just taken the lock is about to replace it.
		r, err := readLock(d)
		if err == nil && hasOpen(r.PID, d.lock()) {
			return r, true, nil
		}
		select {
		case <-time.After(10 * time.Millisecond): // a file has no better way to tell
		case <-ctx.Done():
			return r, true, fmt.Errorf("some process has locked %s and does not say that it is a platform: %w", d.lock(), errors.Join(err, ctx.Err()))
		}
	}
}

// introductionLimit bounds the wait for who has the lock to say who it is, or to
// let go of it as `wrenn down` does when it has cleaned up.
const introductionLimit = time.Minute

// readLock returns what the platform that runs on d, or ran there last, said of
// itself.
func readLock(d dataDir) (runningPlatform, error) {
	var r runningPlatform
	data, err := os.ReadFile(d.lock())
	if err != nil {
		return r, fmt.Errorf("read lock: %w", err)
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return r, fmt.Errorf("read lock %s: %w", d.lock(), err)
	}
	return r, nil
}

// hasOpen reports whether the process has the file open.
func hasOpen(pid int, path string) bool {
	want, err := os.Stat(path)
	if err != nil {
		return false
	}
	fds := fmt.Sprintf("/proc/%d/fd", pid)
	entries, _ := os.ReadDir(fds)
	for _, e := range entries {
		if got, err := os.Stat(filepath.Join(fds, e.Name())); err == nil && os.SameFile(want, got) {
			return true
		}
	}
	return false
}

// stopRunning signals the platform of d and waits until it has let go of the
// data directory. It reports false when none was running.
func stopRunning(ctx context.Context, d dataDir, sig unix.Signal) (bool, error) {
	r, running, err := findRunning(ctx, d)
	if err != nil || !running {
		return false, err
	}
	// The pidfd, not the pid: between reading the file and signalling, the pid
	// may have become another process's.
	fd, err := unix.PidfdOpen(r.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return true, nil
	}
	if err != nil {
		return true, fmt.Errorf("find platform process %d: %w", r.PID, err)
	}
	defer unix.Close(fd)
	if again, still, err := findRunning(ctx, d); err != nil || !still || again.PID != r.PID {
		return true, err
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil {
		return true, fmt.Errorf("signal platform process %d: %w", r.PID, err)
	}
	for {
		if err := ctx.Err(); err != nil {
			return true, fmt.Errorf("platform process %d does not end: %w", r.PID, err)
		}
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(fds, 200); n > 0 {
			return true, nil
		} else if err != nil && !errors.Is(err, unix.EINTR) {
			return true, fmt.Errorf("wait for platform process %d: %w", r.PID, err)
		}
	}
}

// programID tells this build of wrenn from others by the file it runs from.
func programID() string {
	path, err := os.Executable()
	if err != nil {
		return "unknown"
	}
	fi, err := os.Stat(path)
	if err != nil {
		return "replaced"
	}
	return fmt.Sprintf("%s %d %d", path, fi.Size(), fi.ModTime().UnixNano())
}
