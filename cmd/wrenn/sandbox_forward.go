package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/server"
	"github.com/wrenn/wrenn/internal/tunnel"
)

const (
	// openTimeout bounds how long a tunnel may take to open.
	openTimeout = 30 * time.Second
	// lookInterval is how often is looked whether the sandbox is still there while
	// nothing tells.
	lookInterval = 2 * time.Second
)

func newSandboxForwardCmd() *cobra.Command {
	var stdio bool
	cmd := &cobra.Command{
		Use:   "forward ID [[ADDRESS:]LOCAL:]REMOTE… | forward --stdio ID REMOTE",
		Short: "Reach TCP ports of a sandbox from this machine",
		Long: `Listen on this machine and carry each connection to a port of a sandbox, until the
sandbox ends or Ctrl-C. LOCAL is REMOTE if left out, a free port if 0; ADDRESS is
localhost, on IPv4 and IPv6, if left out.

  wrenn sandbox forward ID 5432                  localhost:5432 -> 5432
  wrenn sandbox forward ID 8080:80 0.0.0.0:0:53  two ports at once
  ssh -o ProxyCommand='wrenn sandbox forward --stdio ID 22' user@sandbox`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 || stdio && len(args) != 2 {
				return usageErrorf("want the id of a sandbox and its ports, with --stdio one port")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			forwards, err := parseForwards(args[1:], stdio)
			if err != nil {
				return err
			}
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			info, err := findAwake(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			f := &forwarder{
				client: c, sandbox: c.Sandbox(info), id: info.SandboxID, doubt: make(chan struct{}, 1),
				out: cmd.OutOrStdout(), errOut: cmd.ErrOrStderr(),
			}
			if stdio {
				return f.standardStreams(cmd.Context(), forwards[0].remote)
			}
			return f.run(cmd.Context(), forwards)
		},
	}
	cmd.Flags().BoolVar(&stdio, "stdio", false, "carry standard input and output instead of listening, for ssh's ProxyCommand")
	return cmd
}

// forward is an address on this machine and the port of the sandbox it leads to.
type forward struct {
	local  string // host:port
	remote uint16
}

func parseForwards(args []string, stdio bool) ([]forward, error) {
	forwards := make([]forward, 0, len(args))
	for _, arg := range args {
		f, err := parseForward(arg)
		if err != nil {
			return nil, err
		}
		if stdio && strings.Contains(arg, ":") {
			return nil, usageErrorf("%q: --stdio wants a port of the sandbox only", arg)
		}
		forwards = append(forwards, f)
	}
	return forwards, nil
}

// parseForward reads REMOTE, LOCAL:REMOTE or ADDRESS:LOCAL:REMOTE.
func parseForward(arg string) (forward, error) {
	local, remote := arg, arg
	if i := strings.LastIndexByte(arg, ':'); i >= 0 {
		local, remote = arg[:i], arg[i+1:]
	}
	if !strings.Contains(local, ":") {
		local = "localhost:" + local
	}
	port, err := strconv.ParseUint(remote, 10, 16)
	_, number, err2 := net.SplitHostPort(local)
	_, err3 := strconv.ParseUint(number, 10, 16)
	switch {
	case err != nil, err2 != nil, err3 != nil, port == 0:
		return forward{}, usageErrorf("%q: want [[ADDRESS:]LOCAL:]REMOTE with ports from 1 to 65535, LOCAL 0 for a free one", arg)
	case port == proxy.AgentPort:
		return forward{}, usageErrorf("%q: port %d is the guest agent's and cannot be forwarded", arg, port)
	}
	return forward{local, uint16(port)}, nil
}

// forwarder carries connections to one sandbox.
type forwarder struct {
	client      *client.Client
	sandbox     *client.Sandbox
	id          string
	out, errOut io.Writer
	doubt       chan struct{} // something failed: has the sandbox ended?
}

// run listens and carries until the sandbox ends, which is an error, or a signal
// comes, which is none.
func (f *forwarder) run(ctx context.Context, forwards []forward) error {
	signals, stop := watchSignals()
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	var listeners []net.Listener
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	var remotes []uint16 // of each listener
	for _, forward := range forwards {
		opened, err := server.Listen(forward.local)
		if err != nil {
			return err
		}
		for _, l := range opened {
			listeners, remotes = append(listeners, l), append(remotes, forward.remote)
		}
	}
	work, ctx := errgroup.WithContext(ctx)
	for i, l := range listeners {
		fmt.Fprintf(f.out, "forwarding %s -> %s:%d\n", l.Addr(), f.id, remotes[i])
		work.Go(func() error { return f.accept(ctx, work, l, remotes[i]) })
	}
	work.Go(func() error {
		select {
		case <-signals:
			cancel()
		case <-ctx.Done():
		}
		for _, l := range listeners {
			l.Close()
		}
		return nil
	})
	work.Go(func() error { return f.watch(ctx) })
	return work.Wait()
}

// accept carries what comes to one address.
func (f *forwarder) accept(ctx context.Context, work *errgroup.Group, l net.Listener, remote uint16) error {
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept on %s: %w", l.Addr(), err)
		}
		work.Go(func() error {
			if err := f.carry(ctx, conn.(*net.TCPConn), remote); err != nil && ctx.Err() == nil {
				f.complain(fmt.Sprintf("connection from %s to port %d: %v", conn.RemoteAddr(), remote, err))
			}
			return nil
		})
	}
}

// carry joins a connection with a port of the sandbox.
func (f *forwarder) carry(ctx context.Context, conn tunnel.Stream, remote uint16) error {
	opening, cancel := context.WithTimeout(ctx, openTimeout)
	t, err := f.sandbox.Dial(opening, remote)
	cancel()
	if err != nil {
		tunnel.Reset(conn)
		return err
	}
	stop := context.AfterFunc(ctx, func() {
		tunnel.Reset(conn)
		t.Close()
	})
	defer stop()
	return tunnel.Join(conn, t)
}

// complain tells of a connection that failed.
func (f *forwarder) complain(message string) {
	fmt.Fprintf(f.errOut, "wrenn: %s\n", printable(message))
	select {
	case f.doubt <- struct{}{}:
	default:
	}
}

// watch returns when the sandbox has ended.
func (f *forwarder) watch(ctx context.Context) error {
	ticker := time.NewTicker(lookInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.doubt:
		case <-ticker.C:
		}
		if err := f.ended(ctx); err != nil {
			return err
		}
	}
}

// ended returns why the sandbox is not there any more, nil as long as it is or
// nobody can tell: a platform that is started anew keeps its sandboxes.
func (f *forwarder) ended(ctx context.Context) error {
	_, err := f.client.Get(ctx, f.id)
	if errors.Is(err, sandbox.ErrNotFound) {
		return fmt.Errorf("forwarding has ended: %w", noSandbox(f.id, err))
	}
	return nil
}

// standardStreams makes this program's standard input and output a connection to a
// port.
func (f *forwarder) standardStreams(ctx context.Context, remote uint16) error {
	signals, stop := watchSignals()
	defer stop()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case s := <-signals: // ssh sends one when it is done
			cancel(interrupted{s.(syscall.Signal)}.exit())
		case <-ctx.Done():
		}
	}()
	// A read of stdin cannot be called off, one of a pipe can.
	in, fromStdin := io.Pipe()
	go func() {
		_, err := io.Copy(fromStdin, os.Stdin)
		fromStdin.CloseWithError(err)
	}()
	err := f.carry(ctx, &standardStreams{in, os.Stdout}, remote)
	if err == nil || context.Cause(ctx) != nil {
		return endOf(ctx, err)
	}
	if ended := f.ended(ctx); ended != nil {
		return ended
	}
	return err
}

type standardStreams struct {
	*io.PipeReader
	out *os.File
}

func (s *standardStreams) Write(b []byte) (int, error) { return s.out.Write(b) }
func (s *standardStreams) CloseWrite() error           { return s.out.Close() }
