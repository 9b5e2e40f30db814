package pager

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// Client asks a pager. It may be used from several goroutines at once.
type Client struct {
	conn    *net.UnixConn
	version int        // the pager's
	mu      sync.Mutex // a request and its response at a time
	answers chan response
	gone    chan struct{} // closed when the connection is
}

// helloLimit is how long a pager may take to answer at all: it does nothing for that but
// run.
const helloLimit = 5 * time.Second

// errSilent is of a pager that is there and does not answer.
var errSilent = sandbox.Errorf(sandbox.ErrUnavailable, "the pager does not answer")

// Dial connects to the pager at socket.
func Dial(ctx context.Context, socket string) (*Client, error) {
	conn, err := dial(ctx, socket)
	if err != nil {
		return nil, fmt.Errorf("connect to pager: %w", err)
	}
	c := &Client{conn: conn, answers: make(chan response, 1), gone: make(chan struct{})}
	go c.read()
	resp, err := c.hello(ctx, helloLimit)
	if c.version = resp.Version; err == nil && c.version > Version {
		err = fmt.Errorf("pager at %s is of a later version of wrenn: use that, or end the virtual machines and it with wrenn down", socket)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Self is this program, also when its file was replaced meanwhile: as the command of
// Start.
const Self = "/proc/self/exe"

// Start connects to the pager at socket, and starts one with a command if there is
// none, or one of an earlier version that serves nobody. It outlives this process, and
// writes to log.
func Start(ctx context.Context, socket string, command []string, log *os.File) (*Client, error) {
	c, err := Dial(ctx, socket)
	if err == nil && c.version < Version {
		c, err = replace(ctx, socket, c)
	}
	if err == nil || ctx.Err() != nil || errors.Is(err, errSilent) {
		return c, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start pager: %w", err)
	}
	defer r.Close()
	cmd := exec.Command(command[0], command[1:]...)
	if command[0] == Self {
		cmd.Args[0] = os.Args[0]
	}
	cmd.Stdout, cmd.Stderr = w, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return nil, fmt.Errorf("start pager: %w", err)
	}
	go func() { _ = cmd.Wait() }() // reaps it, if it ends before this process
	stop := context.AfterFunc(ctx, func() { r.Close() })
	defer stop()
	// Another one may have been faster: then this one ends, and that one answers.
	if line, err := bufio.NewReader(r).ReadString('\n'); err == nil && strings.TrimSpace(line) != Ready {
		return nil, fmt.Errorf("start pager: it says %q", line)
	}
	return Dial(ctx, socket)
}

// errReplaced says that there is no pager any more.
var errReplaced = errors.New("the pager was of an earlier version")

// replace ends an earlier pager, unless it serves somebody.
func replace(ctx context.Context, socket string, c *Client) (*Client, error) {
	all, err := c.List(ctx)
	if err == nil && slices.ContainsFunc(all, func(st Status) bool { return st.State != StateEnded }) {
		return c, nil
	}
	c.Close()
	if err == nil {
		err = End(ctx, socket)
	}
	return nil, cmp.Or(err, errReplaced)
}

// hello gives errSilent when there is no answer within limit. The client is of no use any
// more then.
func (c *Client) hello(ctx context.Context, limit time.Duration) (response, error) {
	hctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	resp, err := c.ask(hctx, request{Op: opHello})
	if err != nil && hctx.Err() != nil && ctx.Err() == nil {
		err = errSilent
	}
	return resp, err
}

// Drop has the pager at socket forget a virtual machine, which has ended. It may know
// nothing of it, and there may be no pager.
func Drop(ctx context.Context, socket, id string) error {
	c, err := Dial(ctx, socket)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return nil
	}
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Remove(ctx, id); err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		return err
	}
	return nil
}

// Close lets go of the pager, which goes on.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.gone
	return err
}

// Gone is closed when the pager has ended, or Close was called. The monitors of the
// virtual machines of one that has ended hang until there is another.
func (c *Client) Gone() <-chan struct{} { return c.gone }

func (c *Client) read() {
	defer close(c.gone)
	dec := json.NewDecoder(c.conn)
	for {
		var r response
		if dec.Decode(&r) != nil {
			c.conn.Close()
			return
		}
		select {
		case c.answers <- r:
		default: // nobody asked
			c.conn.Close()
			return
		}
	}
}

// errGone is for what is asked of a pager that has ended.
var errGone = sandbox.Errorf(sandbox.ErrUnavailable, "the pager has ended")

func (c *Client) ask(ctx context.Context, r request) (response, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, err := json.Marshal(r)
	if err != nil {
		return response{}, fmt.Errorf("ask pager: %w", err)
	}
	if _, err := c.conn.Write(append(b, '\n')); err != nil {
		return response{}, fmt.Errorf("ask pager: %w", errGone)
	}
	select {
	case resp := <-c.answers:
		return resp, resp.err()
	case <-c.gone:
		return response{}, fmt.Errorf("ask pager: %w", errGone)
	case <-ctx.Done():
		// Whatever is answered now would be taken for the answer to the next.
		c.Close()
		return response{}, ctx.Err()
	}
}

func (r response) err() error {
	if r.Error == "" {
		return nil
	}
	for _, kind := range []error{sandbox.ErrInvalid, sandbox.ErrNotFound, sandbox.ErrConflict, sandbox.ErrExhausted, sandbox.ErrUnavailable} {
		if r.Kind == kind.Error() {
			return &sandbox.Error{Kind: kind, Message: r.Error}
		}
	}
	return errors.New(r.Error)
}

// Register makes the socket of a virtual machine, whose monitor may connect when
// it returns.
func (c *Client) Register(ctx context.Context, vm VM) error {
	_, err := c.ask(ctx, request{Op: opRegister, VM: &vm})
	if err != nil && c.version < Version {
		err = fmt.Errorf("%w (the pager is of an earlier version, and stays until the virtual machines that it serves have ended)", err)
	}
	return err
}

// List gives all virtual machines, those that have ended too until they are
// removed.
func (c *Client) List(ctx context.Context) ([]Status, error) {
	resp, err := c.ask(ctx, request{Op: opList})
	return resp.VMs, err
}

// Status gives one; sandbox.ErrNotFound when it is not registered.
func (c *Client) Status(ctx context.Context, id string) (Status, error) {
	all, err := c.List(ctx)
	if err != nil {
		return Status{}, err
	}
	for _, st := range all {
		if st.ID == id {
			return st, nil
		}
	}
	return Status{}, sandbox.Errorf(sandbox.ErrNotFound, "no virtual machine %q is registered", id)
}

// FinishRecording writes the working set with what was touched up to now.
func (c *Client) FinishRecording(ctx context.Context, id string) error {
	_, err := c.ask(ctx, request{Op: opFinishRecording, ID: id})
	return err
}

// Remove forgets a virtual machine, and ends its monitor if it has not ended. It
// returns how it was at the end.
func (c *Client) Remove(ctx context.Context, id string) (Status, error) {
	resp, err := c.ask(ctx, request{Op: opRemove, ID: id})
	if err != nil || len(resp.VMs) != 1 {
		return Status{}, err
	}
	return resp.VMs[0], nil
}
