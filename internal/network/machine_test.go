package network

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// onBothKinds runs a test on slots with a guest namespace and on those with a TAP.
func onBothKinds(t *testing.T, test func(t *testing.T, tap bool)) {
	t.Run("namespace", func(t *testing.T) { test(t, false) })
	t.Run("TAP", func(t *testing.T) { test(t, true) })
}

// machines has the guest of each slot with a TAP that a test has asked for.
var machines sync.Map // of *Slot: netns.NsHandle

// startMachine attaches to the slot's TAP what stands for a virtual machine: a
// namespace whose eth0 is a TAP too, and two who carry packets between them as a
// monitor does.
func startMachine(t testing.TB, s *Slot) netns.NsHandle {
	t.Helper()
	if ns, ok := machines.Load(s); ok {
		return ns.(netns.NsHandle)
	}
	outer := openNS(t, s.NetNS)
	var inner netns.NsHandle
	err := onThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		for _, v := range guestSysctls {
			if err := writeSysctl(v[0], v[1]); err != nil {
				return err
			}
		}
		inner, err = netns.Get()
		return err
	})
	if err != nil {
		t.Fatalf("make namespace: %v", err)
	}
	t.Cleanup(func() { inner.Close() })
	monitor, err := attachTAP(outer, downlink)
	if err != nil {
		t.Fatalf("attach to the slot's TAP: %v", err)
	}
	card, err := attachTAP(inner, guestLink)
	if err != nil {
		t.Fatalf("make the machine's interface: %v", err)
	}
	var carriers sync.WaitGroup
	carriers.Go(func() { carry(card, monitor) })
	carriers.Go(func() { carry(monitor, card) })
	machines.Store(s, inner)
	t.Cleanup(func() {
		machines.Delete(s)
		monitor.Close()
		card.Close()
		carriers.Wait()
	})
	err = inside(inner, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		eth, err := h.LinkByName(guestLink)
		if err != nil {
			return err
		}
		if err := h.LinkSetHardwareAddr(eth, GuestMAC); err != nil {
			return err
		}
		return setUpGuest()
	})
	if err != nil {
		t.Fatalf("set up the machine: %v", err)
	}
	if err := s.WaitAttached(); err != nil {
		t.Fatal(err)
	}
	return inner
}

// attachTAP opens the TAP of that name in ns, which it makes if there is none.
func attachTAP(ns netns.NsHandle, name string) (f *os.File, err error) {
	err = inside(ns, func() error {
		f, err = openTAP(name)
		return err
	})
	return f, err
}

func openTAP(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := attach(fd, name); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func attach(fd int, name string) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
}

func carry(to, from *os.File) {
	b := make([]byte, 65<<10)
	for {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		if _, err := to.Write(b[:n]); errors.Is(err, os.ErrClosed) {
			return
		}
	}
}

func TestTheTAPIsItsOwnersAlone(t *testing.T) {
	p := openPool(t, Config{TAP: true, Tag: newTag(t)})
	s := acquire(t, p, Policy{AllowInternet: true})
	for _, uid := range []uint32{64001, 64002} {
		if err := s.GiveTAP(uid); err != nil {
			t.Fatal(err)
		}
		for _, other := range []uint32{64001, 64002} {
			err := asMonitor(t, s, other, "attach")
			if (err == nil) != (uid == other) {
				t.Errorf("the TAP is %d's and %d attaches: %v", uid, other, err)
			}
		}
	}
	link := linkIn(t, s.NetNS, downlink)
	if got := link.Attrs().TxQLen; got != tapQueue {
		t.Errorf("the TAP has a queue of %d packets, want %d", got, tapQueue)
	}
	startMachine(t, s)
	if err := s.GiveTAP(64001); err == nil {
		t.Error("the TAP was given away while a machine was attached")
	}
}

func linkIn(t *testing.T, ns, name string) netlink.Link {
	t.Helper()
	h, err := netlink.NewHandleAt(openNS(t, ns), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return link
}

func TestAMonitorSendsNothingOfItsOwn(t *testing.T) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	p := openPool(t, Config{TAP: true, Tag: tag, Resolver: netip.MustParseAddr(resolverAddr)})
	s := acquire(t, p, Policy{AllowInternet: true})
	g := guest(t, s)
	places := map[string]netns.NsHandle{
		publicAddr + ":9": outside, resolverAddr + ":53": outside, GuestAddr.String() + ":9": g,
		s.HostAddr.Prev().String() + ":9": 0,
	}
	for addr, ns := range places {
		var server net.PacketConn
		err := in(ns, func() (err error) {
			server, err = net.ListenPacket("udp", addr)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		// Root's packets are let through, and show that others would arrive.
		for _, uid := range []uint32{0, 64001, 64002} {
			err := asMonitor(t, s, uid, addr)
			if (err == nil) != (uid == 0) {
				t.Errorf("user %d sends to %s: %v", uid, addr, err)
			}
			server.SetReadDeadline(time.Now().Add(blockedAfter))
			_, _, err = server.ReadFrom(make([]byte, 64))
			if arrived := err == nil; arrived && uid != 0 {
				t.Errorf("a packet of user %d reached %s", uid, addr)
			} else if !arrived && uid == 0 && ns == outside {
				t.Errorf("root's packet did not reach %s: %v", addr, err)
			}
		}
	}
}

// monitorTask makes the test binary a process that a monitor might have become.
var monitorTask = os.Getenv("WRENN_NETWORK_TEST_MONITOR")

// asMonitor runs a process as the user in the slot's namespace: one that attaches
// to the TAP, or that sends a packet to an address.
func asMonitor(t *testing.T, s *Slot, uid uint32, task string) error {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"WRENN_NETWORK_TEST_MONITOR=" + task}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	var out []byte
	err := inside(openNS(t, s.NetNS), func() error {
		// Not every host lets everyone open it: jails hand it on.
		tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer tun.Close()
		cmd.ExtraFiles = []*os.File{tun}
		out, err = cmd.CombinedOutput()
		return err
	})
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("run as user %d: %v", uid, err)
	}
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

func runAsMonitor(task string) {
	err := func() error {
		if task == "attach" {
			return attach(3, downlink)
		}
		c, err := net.Dial("udp", task)
		if err != nil {
			return err
		}
		_, err = c.Write([]byte("secret"))
		return err
	}()
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

func TestTheNextMachineOnATAPIsReachedAtOnce(t *testing.T) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	serve(t, outside, "tcp", publicAddr+":80")
	p := openPool(t, Config{TAP: true, Tag: tag})
	s := acquire(t, p, Policy{AllowInternet: true})
	for range 5 {
		t.Run("machine", func(t *testing.T) {
			g := startMachine(t, s)
			serve(t, g, "tcp", "0.0.0.0:8000")
			start := time.Now()
			answers(t, 0, "tcp", s.HostAddr.String()+":8000")
			answers(t, g, "tcp", publicAddr+":80")
			if d := time.Since(start); d > 500*time.Millisecond {
				t.Errorf("first connections took %v", d)
			}
		})
	}
}

// TestConnectionsOfAnotherLifeAreReset has a connection open that nobody but the
// guest knows, as after a resume in another slot.
func TestConnectionsOfAnotherLifeAreReset(t *testing.T) {
	onBothKinds(t, testConnectionsOfAnotherLife)
}

func testConnectionsOfAnotherLife(t *testing.T, tap bool) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	serve(t, outside, "tcp", publicAddr+":80")
	p := openPool(t, Config{TAP: tap, Tag: tag})
	s := acquire(t, p, Policy{AllowInternet: true})
	g := guest(t, s)
	c, err := dial(g, "tcp", publicAddr+":80", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.ask(time.Second); err != nil {
		t.Fatal(err)
	}
	err = inside(openNS(t, s.NetNS), func() error {
		_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, allFlows{})
		return err
	})
	if err != nil {
		t.Skip("cannot make the kernel forget connections here: ", err)
	}
	if _, err := c.ask(2 * time.Second); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a connection that nobody knows: %v, want it reset", err)
	}
	answers(t, g, "tcp", publicAddr+":80")
}

type allFlows struct{}

func (allFlows) MatchConntrackFlow(*netlink.ConntrackFlow) bool { return true }

func TestWhatAMachineSendsIsBounded(t *testing.T) {
	tag := newTag(t)
	p := openPool(t, Config{TAP: true, Tag: tag})
	s := acquire(t, p, Policy{AllowInternet: true})
	h, err := netlink.NewHandleAt(openNS(t, s.NetNS), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	up := linkIn(t, s.NetNS, uplink)
	bound := func() *netlink.Tbf {
		disciplines, err := h.QdiscList(up)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range disciplines {
			if filter, ok := d.(*netlink.Tbf); ok {
				return filter
			}
		}
		t.Fatalf("none of %v bounds what is sent", disciplines)
		return nil
	}
	if got := bound(); got.Rate != sendRate {
		t.Errorf("a machine may send %d bytes a second, want %d", got.Rate, sendRate)
	}

	// The true rate is more than these two can carry.
	const rate, burst = 4 << 20, 1 << 20
	if err := limitSending(h, up, rate, burst); err != nil {
		t.Fatal(err)
	}
	g := guest(t, s)
	var server net.Listener
	err = in(g, func() (err error) {
		server, err = net.Listen("tcp", "0.0.0.0:8000")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var sender sync.WaitGroup
	sender.Go(func() {
		c, err := server.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		for b := make([]byte, 64<<10); err == nil; {
			_, err = c.Write(b)
		}
	})
	defer sender.Wait()
	defer server.Close()
	c, err := net.Dial("tcp", s.HostAddr.String()+":8000")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	serve(t, g, "tcp", "0.0.0.0:8001")
	start := time.Now()
	answers(t, 0, "tcp", s.HostAddr.String()+":8001") // beside the other
	const size = 3*rate + burst
	if _, err := io.CopyN(io.Discard, c, size); err != nil {
		t.Fatal(err)
	}
	// What is in a buffer somewhere when the time begins counts as burst.
	if d := time.Since(start); d < 2*time.Second || d > 10*time.Second {
		t.Errorf("%d bytes took %v at %d bytes a second", size, d, rate)
	}
}
