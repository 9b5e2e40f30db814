package forward

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	guest4 = "169.254.0.21"
	guest6 = "fd00::21"

	helperMode  = "FORWARD_TEST_HELPER" // "redirect" or "listen": what the helper process does
	helperQuiet = "FORWARD_TEST_QUIET"  // that it lists sockets as in gVisor, and nobody wakes it
)

// TestMain also is the process that forwards: it has to be in the namespace with
// all its threads.
func TestMain(m *testing.M) {
	mode := os.Getenv(helperMode)
	if mode == "" {
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	f := New(Config{Log: log})
	if mode == "listen" {
		f.expose = func(ctx context.Context) (exposer, error) { return newListening(ctx, f.serve), nil }
	}
	if os.Getenv(helperQuiet) != "" {
		f.open = func() (sockets, error) { return openProcNet("/proc/net") }
	}
	f.Run(ctx, 49983)
}

// world is a sandbox's network namespace, and one outside it that has a link to it.
type world struct {
	guest, outside netns.NsHandle
	forwarder      *exec.Cmd
}

// newWorld makes the namespaces and starts a forwarder in the guest.
func newWorld(t testing.TB, mode string) *world {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to make network namespaces")
	}
	w := &world{guest: newNamespace(t), outside: newNamespace(t)}
	must(t, w.in(w.outside, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "peer0"
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(w.guest)})
	}))
	must(t, w.in(w.guest, func() error {
		if err := configure("lo"); err != nil {
			return err
		}
		return configure("eth0", guest4+"/30", guest6+"/64")
	}))
	must(t, w.in(w.outside, func() error { return configure("peer0", "169.254.0.22/30", "fd00::22/64") }))
	// What is sent before both ends are up is lost.
	for ns, name := range map[netns.NsHandle]string{w.guest: "eth0", w.outside: "peer0"} {
		w.eventually(t, name+" is up", func() (up bool) {
			must(t, w.in(ns, func() error {
				link, err := netlink.LinkByName(name)
				up = err == nil && link.Attrs().OperState == netlink.OperUp
				return err
			}))
			return up
		})
	}
	w.start(t, mode)
	return w
}

func configure(name string, addrs ...string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		addr.Flags = unix.IFA_F_NODAD
		if addr.IP.To4() != nil {
			addr.Flags = 0
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add %s to %s: %w", a, name, err)
		}
	}
	return netlink.LinkSetUp(link)
}

func newNamespace(t testing.TB) netns.NsHandle {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	old, err := netns.Get()
	must(t, err)
	defer old.Close()
	ns, err := netns.New()
	must(t, err)
	must(t, netns.Set(old))
	t.Cleanup(func() { ns.Close() })
	return ns
}

// in calls f in a namespace. Sockets that f opens stay there.
func (w *world) in(ns netns.NsHandle, f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	old, err := netns.Get()
	if err != nil {
		return err
	}
	defer old.Close()
	if err := netns.Set(ns); err != nil {
		return err
	}
	defer func() {
		if err := netns.Set(old); err != nil {
			panic(err)
		}
	}()
	return f()
}

// start starts a forwarder; a process started from a thread is in its namespace.
func (w *world) start(t testing.TB, mode string) {
	t.Helper()
	must(t, w.in(w.guest, func() error {
		w.forwarder = exec.Command("/proc/self/exe")
		w.forwarder.Env = append(os.Environ(), helperMode+"="+mode)
		w.forwarder.Stderr = os.Stderr
		return w.forwarder.Start()
	}))
	t.Cleanup(w.stop)
	// It is at work once it forwards.
	l := w.listen(t, "127.0.0.1:1")
	w.eventually(t, "the first listener is reachable", func() bool { return w.reaches(guest4 + ":1") })
	l.Close()
	w.eventually(t, "the first listener is gone", func() bool { return !w.reaches(guest4 + ":1") })
}

func (w *world) stop() {
	if w.forwarder.ProcessState == nil {
		_ = w.forwarder.Process.Signal(syscall.SIGTERM)
		_ = w.forwarder.Wait()
	}
}

// listen listens in the guest as a program there would, with SO_REUSEADDR.
func (w *world) listen(t testing.TB, addr string) *net.TCPListener {
	t.Helper()
	l, err := w.tryListen(addr, true)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	return l
}

func (w *world) tryListen(addr string, reuse bool) (l *net.TCPListener, err error) {
	at := netip.MustParseAddrPort(addr)
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) {
			if !reuse {
				failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 0)
			}
		})
		if err != nil {
			return err
		}
		return failed
	}}
	network := "tcp4"
	if at.Addr().Is6() {
		network = "tcp6" // sets IPV6_V6ONLY
	}
	err = w.in(w.guest, func() error {
		got, err := config.Listen(context.Background(), network, addr)
		if err == nil {
			l = got.(*net.TCPListener)
		}
		return err
	})
	return l, err
}

// dial connects from outside.
func (w *world) dial(addr string) (conn *net.TCPConn, err error) {
	err = w.in(w.outside, func() error {
		conn, err = net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
		return err
	})
	return conn, err
}

func (w *world) mustDial(t testing.TB, addr string) *net.TCPConn {
	t.Helper()
	conn, err := w.dial(addr)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// reaches says whether a connection from outside gets to somebody. A connection
// that is accepted only to be reset got to nobody.
func (w *world) reaches(addr string) bool {
	conn, err := w.dial(addr)
	if err != nil {
		return false
	}
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
	_, err = conn.Read(make([]byte, 1))
	return err == nil || err == io.EOF || os.IsTimeout(err)
}

// says is what the server at addr greets with.
func (w *world) says(addr string) (string, error) {
	conn, err := w.dial(addr)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	greeting, err := io.ReadAll(conn)
	return string(greeting), err
}

// greet answers each connection with a text.
func greet(l net.Listener, text string) {
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, text)
			c.Close()
		}
	}()
}

func (w *world) eventually(t testing.TB, what string, ok func() bool) time.Duration {
	t.Helper()
	started := time.Now()
	for !ok() {
		if time.Since(started) > 5*time.Second {
			t.Fatalf("not within 5 s: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
	return time.Since(started)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
