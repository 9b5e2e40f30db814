package microvm

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/wrenn/wrenn/internal/runtime"
)

// A guest can write to its console as fast as it likes, and all of it is read by
// the agent: so at this rate and no faster, and only the last of it is kept.
const (
	consoleKept  = 32 << 10
	consoleRate  = 256 << 10 // bytes a second
	consoleBurst = 64 << 10  // also what a pipe holds
	drained      = 16        // bursts that are taken of an ended monitor: somebody else may write on
)

// makeConsole makes the two pipes of a machine's console.
func makeConsole(m Machine) error {
	for _, name := range []string{m.Console(), m.consoleInput()} {
		if err := unix.Mkfifo(name, 0o600); err != nil {
			return fmt.Errorf("make console: %w", err)
		}
		if err := os.Chown(name, int(m.UID), int(m.UID)); err != nil {
			return fmt.Errorf("make console: %w", err)
		}
	}
	return nil
}

// console reads what the machine's serial port says and keeps the last of it, in a
// file: from it the reason of an end is known, also to a later agent. One process
// reads at a time. A nil console says nothing.
type console struct {
	pipe *os.File
	log  *os.File // locked by who reads the pipe
	mine bool     // by us
}

// OpenConsole opens the pipe of a machine's console for both ways, without waiting for
// another end. The directory is its monitor's, which may have put something else there:
// that is refused before it is opened for what it is.
func OpenConsole(m Machine) (*os.File, error) {
	fd, err := unix.Open(m.Console(), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open console: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("open console: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFIFO || st.Uid != m.UID {
		return nil, fmt.Errorf("open console: %s is not the pipe that was made", m.Console())
	}
	pipe, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open console: %w", err)
	}
	return os.NewFile(uintptr(pipe), m.Console()), nil
}

// openConsole opens the pipe. It is opened for writing as well, so that it is never
// at its end.
func openConsole(m Machine) (_ *console, err error) {
	pipe, err := OpenConsole(m)
	if err != nil {
		return nil, err
	}
	c := &console{pipe: pipe}
	if c.log, err = os.OpenFile(m.ConsoleLog(), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600); err != nil {
		c.pipe.Close()
		return nil, fmt.Errorf("open console: %w", err)
	}
	c.mine = unix.Flock(int(c.log.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
	return c, nil
}

// follow reads until interrupt is called and ctx has ended.
func (c *console) follow(ctx context.Context) {
	if c == nil {
		return
	}
	limit := rate.NewLimiter(consoleRate, consoleBurst)
	buf := make([]byte, consoleBurst)
	for c.mine {
		n, err := c.pipe.Read(buf)
		c.add(buf[:n])
		if err != nil || limit.WaitN(ctx, n) != nil {
			return
		}
	}
}

// interrupt ends a read under way.
func (c *console) interrupt() {
	if c != nil {
		_ = c.pipe.SetReadDeadline(time.Now())
	}
}

// drain takes what is in the pipe when nobody writes to it any more. Whoever else
// reads it does the same now, and is waited for.
func (c *console) drain() {
	if c == nil {
		return
	}
	if !c.mine {
		if err := unix.Flock(int(c.log.Fd()), unix.LOCK_EX); err != nil {
			return
		}
	}
	conn, err := c.pipe.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, consoleBurst)
	_ = conn.Control(func(fd uintptr) { // an error leaves the reason unknown
		for range drained {
			n, err := unix.Read(int(fd), buf)
			if n <= 0 || err != nil {
				return
			}
			c.add(buf[:n])
		}
	})
}

// add appends to the log, and leaves only the end of one that has become long.
func (c *console) add(data []byte) {
	if len(data) == 0 {
		return
	}
	if info, err := c.log.Stat(); err == nil && info.Size()+int64(len(data)) > 2*consoleKept {
		kept := c.text()
		kept = kept[max(0, len(kept)-consoleKept):]
		_ = c.log.Truncate(0) // as below
		data = append(kept, data...)
	}
	_, _ = c.log.Write(data) // a full disk loses words, and the reason of an end with them
}

func (c *console) text() []byte {
	if c == nil {
		return nil
	}
	data, err := io.ReadAll(io.NewSectionReader(c.log, 0, 4*consoleKept))
	if err != nil {
		return nil
	}
	return data
}

// lastLine is what was said last, to be put behind the reason of an end: there a monitor
// says why it gives up.
func (c *console) lastLine() string {
	lines := strings.Split(strings.TrimSpace(string(c.text())), "\n")
	line := strings.TrimSpace(strings.ToValidUTF8(lines[len(lines)-1], "?"))
	if line == "" {
		return ""
	}
	return fmt.Sprintf(": %.200s", line)
}

// What Linux says when it cannot go on (kernel/exit.c, mm/oom_kill.c), and what guestboot
// does.
var (
	initEnded    = regexp.MustCompile(`Attempted to kill init! exitcode=0x([0-9a-f]{8})`)
	notBooted    = regexp.MustCompile(`guestboot: the machine cannot start: ([^\r\n]*)`)
	panicked     = regexp.MustCompile(`Kernel panic - not syncing: ([^\r\n]*)`)
	memoryPanics = [][]byte{[]byte("System is deadlocked on memory"), []byte("Out of memory and no killable processes"), []byte("Out of memory: compulsory panic_on_oom")}
)

// ending says in words how a machine ended by itself.
func ending(said []byte, memoryMiB int64) runtime.Exit {
	for _, words := range memoryPanics {
		if bytes.Contains(said, words) {
			return outOfMemory(memoryMiB)
		}
	}
	if m := initEnded.FindSubmatch(said); m != nil {
		code, _ := strconv.ParseUint(string(m[1]), 16, 32) // the pattern lets nothing else through
		ws := unix.WaitStatus(code)
		if ws.Signaled() {
			return runtime.Exit{Reason: fmt.Sprintf("guest agent was killed (signal %d)", ws.Signal())}
		}
		return runtime.Exit{Reason: fmt.Sprintf("guest agent exited with status %d", ws.ExitStatus())}
	}
	if m := notBooted.FindSubmatch(said); m != nil {
		return runtime.Exit{Reason: fmt.Sprintf("the sandbox's machine cannot start: %.200s", m[1])}
	}
	if m := panicked.FindSubmatch(said); m != nil {
		return runtime.Exit{Reason: fmt.Sprintf("the sandbox's kernel crashed: %.200s", m[1])}
	}
	return runtime.Exit{Reason: "the sandbox's machine was switched off from inside"}
}

func outOfMemory(memoryMiB int64) runtime.Exit {
	return runtime.Exit{OutOfMemory: true, Reason: fmt.Sprintf("out of memory: the sandbox exceeded its limit of %d MiB", memoryMiB)}
}

// LastWords reads what is in the pipe of a console, for a monitor that has ended
// before anybody followed it.
func LastWords(m Machine) string {
	c, err := openConsole(m)
	if err != nil {
		return ""
	}
	defer c.close()
	c.drain()
	return string(bytes.TrimSpace(c.text()))
}

func (c *console) close() {
	if c == nil {
		return
	}
	c.pipe.Close()
	c.log.Close() // unlocks it
}
