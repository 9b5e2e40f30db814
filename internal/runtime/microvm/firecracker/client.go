package firecracker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// How long calls may take. What moves a machine's memory gets time by its size.
const (
	shortTime    = 5 * time.Second
	startTime    = 30 * time.Second // builds the machine
	snapshotTime = 30 * time.Second // and for the memory:
	slowestDisk  = 32 << 20         // bytes a second
)

// maxAnswer bounds what a Firecracker that was taken over can make us keep.
const maxAnswer = 1 << 20

// Error is an answer of Firecracker that says no.
type Error struct {
	Method, Path string
	Status       int
	Message      string // what Firecracker says; the body when that is not in its form
}

func (e *Error) Error() string {
	return fmt.Sprintf("firecracker refuses %s %s with status %d: %s", e.Method, e.Path, e.Status, e.Message)
}

// Client calls the API of one Firecracker. It is made for one machine's socket and
// may be used from several goroutines.
type Client struct {
	http *http.Client
}

// NewClient makes a client for the socket at this path, which need not be there yet.
func NewClient(socket string) *Client {
	return newClient(func(ctx context.Context) (net.Conn, error) { return dial(ctx, socket) })
}

// newJailed makes a client for a Firecracker that runs as this user. It may have been
// taken over and have put another's socket in the place of its own.
func newJailed(socket string, uid uint32) *Client {
	return newClient(func(ctx context.Context) (net.Conn, error) {
		conn, err := dial(ctx, socket)
		if err != nil {
			return nil, err
		}
		if err := checkPeer(conn, uid); err != nil {
			conn.Close()
			return nil, err
		}
		return conn, nil
	})
}

func checkPeer(conn net.Conn, uid uint32) error {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(cerr, err); err != nil {
		return fmt.Errorf("ask who listens: %w", err)
	}
	if cred.Uid != uid {
		return fmt.Errorf("the socket is user %d's and not the machine's", cred.Uid)
	}
	return nil
}

func newClient(dial func(context.Context) (net.Conn, error)) *Client {
	return &Client{http: &http.Client{
		Transport: &http.Transport{
			DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
			DisableCompression: true,
			MaxIdleConns:       1, // Firecracker takes ten connections in all
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Close closes the connections that are kept for the next call.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// dial connects by way of the directory's descriptor: the path of a socket may have
// no more than 107 bytes.
func dial(ctx context.Context, socket string) (net.Conn, error) {
	fd, err := unix.Open(filepath.Dir(socket), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open directory of %s: %w", socket, err)
	}
	dir := os.NewFile(uintptr(fd), filepath.Dir(socket))
	defer dir.Close()
	var d net.Dialer
	return d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(socket)))
}

// call makes one call. in and out may be nil.
func (c *Client) call(ctx context.Context, limit time.Duration, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := c.exchange(ctx, method, path, in, out); err != nil {
		return fmt.Errorf("call firecracker: %w", err)
	}
	return nil
}

func (c *Client) exchange(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode %s %s: %w", method, path, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("read answer to %s %s: %w", method, path, err)
	}
	if resp.StatusCode >= 300 {
		return &Error{Method: method, Path: path, Status: resp.StatusCode, Message: fault(answer)}
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("decode answer to %s %s: %w", method, path, err)
	}
	return nil
}

func fault(body []byte) string {
	var f struct {
		Message string `json:"fault_message"`
	}
	if json.Unmarshal(body, &f) == nil && f.Message != "" {
		return f.Message
	}
	return strings.TrimSpace(fmt.Sprintf("%.500s", body))
}

// memoryTime is how long a call may take that reads or writes a machine's memory.
func memoryTime(mib int64) time.Duration {
	return snapshotTime + time.Duration(mib<<20/slowestDisk)*time.Second
}
