package machine

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of what the agent says on the console, which the host has to read.
const (
	consoleBurst = 16 << 10 // bytes
	consoleRate  = 1 << 10  // bytes a second
)

// Console is the machine's console. Writing to it never blocks: what the host
// does not read, or what is too much, is dropped. The zero value drops all.
type Console struct {
	fd int

	mu   sync.Mutex
	left float64
	last time.Time
	now  func() time.Time
}

// OpenConsole opens the console at path; without one it is standard error.
func OpenConsole(path string) *Console {
	c := &Console{fd: 2, left: consoleBurst, now: time.Now}
	c.last = c.now()
	if fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
		c.fd = fd
	}
	return c
}

// Write writes a line as a whole or not at all. It never fails.
func (c *Console) Write(line []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	c.left = min(consoleBurst, c.left+now.Sub(c.last).Seconds()*consoleRate)
	c.last = now
	if float64(len(line)) <= c.left {
		c.left -= float64(len(line))
		_, _ = unix.Write(c.fd, line) // a console that takes nothing now is not waited for
	}
	return len(line), nil
}
