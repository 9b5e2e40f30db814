package guest

import (
	"context"
	"errors"
	"net"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// full is a listener that loses every SYN until something is accepted.
func full(t *testing.T) (l net.Listener, addr string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	if l, err = net.FileListener(f); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	addr = net.JoinHostPort("127.0.0.1", strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
	for { // until there is no more room
		c, err := net.DialTimeout("tcp", addr, 100*time.Millisecond)
		if err != nil {
			return l, addr
		}
		t.Cleanup(func() { c.Close() })
	}
}

// TestDial connects soon after the guest answers at last, and gives up where nobody
// listens or when it is told to.
func TestDial(t *testing.T) {
	t.Parallel()
	l, addr := full(t)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Millisecond)
	defer cancel()
	var timeout net.Error
	if c, err := Dial(ctx, "tcp", addr); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("with nobody who answers: %v, %v", c, err)
	}
	begin := time.Now()
	go func() {
		<-time.After(100 * time.Millisecond)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
		}
	}()
	c, err := Dial(t.Context(), "tcp", addr)
	if took := time.Since(begin); err != nil || took > 900*time.Millisecond {
		t.Errorf("%v after %s: the kernel's own second try", err, took)
	}
	if c != nil {
		c.Close()
	}
	l.Close()
	begin = time.Now()
	if _, err := Dial(t.Context(), "tcp", addr); !errors.Is(err, unix.ECONNREFUSED) || time.Since(begin) > dialLimit {
		t.Errorf("where nobody listens: %v after %s", err, time.Since(begin))
	}
}
