package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/runtime/microvm"
)

// impostor answers at a control socket as a QEMU that was taken over may.
func impostor(t *testing.T, talk func(net.Conn)) (dir string) {
	t.Helper()
	dir = t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, socketName))
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		talk(c)
	}()
	t.Cleanup(func() {
		l.Close()
		<-over
	})
	return dir
}

const greeting = `{"QMP":{}}` + "\n"

func TestAnEndlessLineIsNotRead(t *testing.T) {
	sent := 0
	t.Cleanup(func() { // once the impostor is over
		if sent > 4*maxMessage {
			t.Errorf("%d bytes of it were read", sent)
		}
	})
	dir := impostor(t, func(c net.Conn) {
		for b := []byte(strings.Repeat("a", 64<<10)); ; {
			n, err := c.Write(b)
			sent += n
			if err != nil {
				return
			}
		}
	})
	_, err := dial(t.Context(), dir, socketName)
	if err == nil {
		t.Error("it is a greeting")
	}
}

func TestEventsWithoutEndAreNotKept(t *testing.T) {
	dir := impostor(t, func(c net.Conn) {
		fmt.Fprint(c, greeting+`{"return":{}}`+"\n")
		for {
			if _, err := fmt.Fprintln(c, `{"event":"E"}`); err != nil {
				return
			}
		}
	})
	q, err := dial(t.Context(), dir, socketName)
	if err != nil {
		t.Fatal(err)
	}
	defer q.close()
	if err := q.do(t.Context(), "stop", nil, nil); err == nil || !strings.Contains(err.Error(), "without end") {
		t.Errorf("the command gives %v", err)
	}
	if len(q.events) > maxEvents {
		t.Errorf("%d events are kept", len(q.events))
	}
}

func TestASilentQEMUIsGivenUp(t *testing.T) {
	dir := impostor(t, func(c net.Conn) { _, _ = c.Read(make([]byte, 1)) })
	began := time.Now()
	if _, err := dial(t.Context(), dir, socketName); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("it gives %v", err)
	}
	if d := time.Since(began); d > 2*commandTime {
		t.Errorf("that took %v", d)
	}
}

// TestAnothersSocketIsNotCalled has a machine's monitor put a link to another machine's
// socket in the place of its own.
func TestAnothersSocketIsNotCalled(t *testing.T) {
	called := make(chan struct{})
	victim := impostor(t, func(net.Conn) { close(called) })
	m := microvm.Machine{Dir: t.TempDir()}
	err := errors.Join(os.Mkdir(m.Run(), 0o700), os.Symlink(filepath.Join(victim, socketName), filepath.Join(m.Run(), socketName)))
	if err != nil {
		t.Fatal(err)
	}
	err = new(Monitor).Pause(t.Context(), m)
	select {
	case <-called:
		t.Errorf("the other machine was called (%v)", err)
	default:
		if !errors.Is(err, unix.ECONNREFUSED) { // as by a file that is no socket
			t.Errorf("the link is called: %v", err)
		}
	}
}
