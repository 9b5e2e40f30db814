package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// qmp is a connection to the control socket of a QEMU process. QEMU serves one at a
// time, and lets the next one in when it is closed.
// Protocol: QEMU documentation, "QEMU Machine Protocol Specification".
type qmp struct {
	conn   *net.UnixConn
	in     *bufio.Reader
	events []event
}

// message is any of what QEMU sends.
type message struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	event
}

type event struct {
	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"`
}

// What a QEMU that was taken over may cost its host.
const (
	maxMessage = 1 << 20 // bytes
	maxEvents  = 256     // that wait for somebody to ask
)

// commandTime bounds commands that only turn a switch.
const commandTime = 10 * time.Second

// dial connects to the socket of the name in the directory dir, and waits until QEMU
// greets. The path may be longer than a socket's address. QEMU may write in dir: where it
// has put a link to another machine's socket in the place of its own, that is not followed.
func dial(ctx context.Context, dir, name string) (_ *qmp, err error) {
	fd, err := unix.Open(filepath.Join(dir, name), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("connect to qemu: %w", err)
	}
	socket := os.NewFile(uintptr(fd), name)
	defer socket.Close()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d", socket.Fd()))
	if err != nil {
		return nil, fmt.Errorf("connect to qemu: %w", err)
	}
	q := &qmp{conn: conn.(*net.UnixConn), in: bufio.NewReaderSize(conn, maxMessage)}
	defer func() {
		if err != nil {
			q.close()
		}
	}()
	greet, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	err = q.during(greet, func() error {
		m, err := q.read()
		if err == nil && m.Greeting == nil {
			err = errors.New("it does not greet")
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("connect to qemu: %w", err)
	}
	return q, q.do(ctx, "qmp_capabilities", nil, nil)
}

func (q *qmp) close() { q.conn.Close() }

// during runs f, whose reads and writes end with ctx.
func (q *qmp) during(ctx context.Context, f func() error) error {
	stop := context.AfterFunc(ctx, func() { _ = q.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	err := f()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func (q *qmp) read() (message, error) {
	var m message
	line, err := q.in.ReadSlice('\n')
	if err != nil {
		return m, err
	}
	return m, json.Unmarshal(line, &m)
}

func (q *qmp) keep(e event) error {
	if len(q.events) == maxEvents {
		return errors.New("it sends events without end")
	}
	q.events = append(q.events, e)
	return nil
}

// do executes a command. Its result is read into result unless that is nil.
func (q *qmp) do(ctx context.Context, command string, args, result any) error {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	return q.long(ctx, command, args, result)
}

// lend gives QEMU a file that is open for writing, and returns the path that QEMU opens
// it by. It keeps the file until a connection ends while the machine runs.
func (q *qmp) lend(ctx context.Context, f *os.File) (path string, err error) {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	var set struct {
		ID int `json:"fdset-id"`
	}
	if err := q.exchange(ctx, "add-fd", nil, &set, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("/dev/fdset/%d", set.ID), nil
}

// long is do for a command that may take as long as ctx lets it.
func (q *qmp) long(ctx context.Context, command string, args, result any) error {
	return q.exchange(ctx, command, args, result, nil)
}

// exchange executes a command, which a file goes with unless that is nil.
func (q *qmp) exchange(ctx context.Context, command string, args, result any, file *os.File) error {
	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return err
	}
	var m message
	err = q.during(ctx, func() error {
		if err := q.send(append(request, '\n'), file); err != nil {
			return err
		}
		for {
			if m, err = q.read(); err != nil || m.Return != nil || m.Error != nil {
				return err
			}
			if err := q.keep(m.event); err != nil {
				return err
			}
		}
	})
	switch {
	case err != nil:
		return fmt.Errorf("qemu: %s: %w", command, err)
	case m.Error != nil:
		return fmt.Errorf("qemu: %s: %s", command, m.Error.Desc)
	case result != nil:
		if err := json.Unmarshal(m.Return, result); err != nil {
			return fmt.Errorf("qemu: %s: %w", command, err)
		}
	}
	return nil
}

func (q *qmp) send(request []byte, file *os.File) error {
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	n, _, err := q.conn.WriteMsgUnix(request, rights, nil)
	if err == nil && n < len(request) {
		_, err = q.conn.Write(request[n:])
	}
	return err
}

// await waits for an event that is accepted.
func (q *qmp) await(ctx context.Context, accept func(event) bool) error {
	return q.during(ctx, func() error {
		for {
			for len(q.events) > 0 {
				e := q.events[0]
				q.events = q.events[1:]
				if accept(e) {
					return nil
				}
			}
			m, err := q.read()
			if err == nil {
				err = q.keep(m.event)
			}
			if err != nil {
				return err
			}
		}
	})
}
