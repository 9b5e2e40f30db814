package network

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// crashTag makes the test binary a process that is there to be killed.
var crashTag = os.Getenv("WRENN_NETWORK_TEST_TAG")

// runUntilKilled holds two slots, prints them, and takes and frees others,
// printing a line each time.
func runUntilKilled(tag string) {
	ctx := context.Background()
	check := func(err error) {
		if err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
	}
	p, err := Open(ctx, Config{Tag: tag, Ready: 3, TAP: os.Getenv("WRENN_NETWORK_TEST_TAP") != ""}, nil)
	check(err)
	for _, policy := range []Policy{{AllowInternet: true}, {}} {
		s, err := p.Acquire(ctx, policy)
		check(err)
		fmt.Println(s.Index)
	}
	var group sync.WaitGroup
	for range 3 {
		group.Go(func() {
			for {
				s, err := p.Acquire(ctx, Policy{})
				check(err)
				check(p.Release(ctx, s))
				fmt.Println("cycle")
			}
		})
	}
	group.Wait()
}

func TestOpenRecoversFromAKilledProcess(t *testing.T) {
	onBothKinds(t, testOpenRecoversFromAKilledProcess)
}

func testOpenRecoversFromAKilledProcess(t *testing.T, tap bool) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	serve(t, outside, "tcp", publicAddr+":80")
	serve(t, outside, "tcp", privateAddr+":80")
	for round := range 5 {
		open, closed := startAndKill(t, tag, tap, 1+3*round)

		p, err := Open(t.Context(), Config{TAP: tap, Tag: tag}, []int{open, closed, 30000})
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := p.Adopted(30000); ok {
			t.Error("a slot that never was is adopted")
		}
		a, ok := p.Adopted(open)
		if !ok {
			t.Fatalf("slot %d is not adopted; there is %v", open, leftovers(t, tag))
		}
		b, ok := p.Adopted(closed)
		if !ok {
			t.Fatalf("slot %d is not adopted", closed)
		}
		// Two slots with their names, the table and the route.
		if left := leftovers(t, tag); len(left) != 2*namesOf(tap)+2 {
			t.Errorf("after Open there is %v, want the adopted slots only", left)
		}
		answers(t, guest(t, a), "tcp", publicAddr+":80")
		blocked(t, guest(t, a), "tcp", privateAddr+":80")
		blocked(t, guest(t, b), "tcp", publicAddr+":80")
		serve(t, guest(t, b), "tcp", "0.0.0.0:8000")
		answers(t, 0, "tcp", b.HostAddr.String()+":8000")
		fresh := acquire(t, p, Policy{AllowInternet: true})
		answers(t, guest(t, fresh), "tcp", publicAddr+":80")
		closePool(t, p)
		if left := leftovers(t, tag); len(left) > 0 {
			t.Fatalf("left on the host: %v", left)
		}
	}
}

// startAndKill runs a process with slots, kills it after some cycles and returns
// the indexes of the slots it held, with and without internet.
func startAndKill(t *testing.T, tag string, tap bool, cycles int) (open, closed int) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "WRENN_NETWORK_TEST_TAG="+tag)
	if tap {
		cmd.Env = append(cmd.Env, "WRENN_NETWORK_TEST_TAP=1")
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	r := bufio.NewReader(out)
	if _, err := fmt.Fscanf(r, "%d\n%d\n", &open, &closed); err != nil {
		t.Fatalf("read from the process to be killed: %v", err)
	}
	for range cycles {
		if line, err := r.ReadString('\n'); err != nil || line != "cycle\n" {
			t.Fatalf("read from the process to be killed: %q, %v", line, err)
		}
	}
	return open, closed
}

func TestOpenRemovesPartsOfSlots(t *testing.T) { onBothKinds(t, testOpenRemovesPartsOfSlots) }

func testOpenRemovesPartsOfSlots(t *testing.T, tap bool) {
	tag := newTag(t)
	p := openPool(t, Config{TAP: tap, Tag: tag})
	whole := acquire(t, p, Policy{})
	noLink := acquire(t, p, Policy{})
	noGuest := acquire(t, p, Policy{})
	if err := deleteLink(linkName(tag, noLink.Index)); err != nil {
		t.Fatal(err)
	}
	if err := removeNamespace(noGuest.InnerNetNS); err != nil {
		t.Fatal(err)
	}
	// As left by a process killed between making the name and what it names.
	if err := os.WriteFile(filepath.Join(netnsDir, nsPrefix(tag)+"77g"), nil, 0o444); err != nil {
		t.Fatal(err)
	}

	again := openPool(t, Config{TAP: tap, Tag: tag}, whole.Index, noLink.Index, noGuest.Index, 77)
	for _, c := range []struct {
		index int
		want  bool
	}{{whole.Index, true}, {noLink.Index, false}, {noGuest.Index, false}, {77, false}} {
		if _, ok := again.Adopted(c.index); ok != c.want {
			t.Errorf("slot %d adopted: %v, want %v", c.index, ok, c.want)
		}
	}
	if left := leftovers(t, tag); len(left) != namesOf(tap)+2 {
		t.Errorf("after Open there is %v, want one slot, the table and the route", left)
	}
}

// namesOf is how many host-wide names a slot has.
func namesOf(tap bool) int {
	if tap {
		return 2
	}
	return 3
}

func TestTagsDoNotMeet(t *testing.T) { onBothKinds(t, testTagsDoNotMeet) }

func testTagsDoNotMeet(t *testing.T, tap bool) {
	a, b := newTag(t), newTag(t)
	pa, pb := openPool(t, Config{TAP: tap, Tag: a}), openPool(t, Config{TAP: tap, Tag: b})
	if pa.CIDR().Overlaps(pb.CIDR()) {
		t.Errorf("both got addresses in %s and %s", pa.CIDR(), pb.CIDR())
	}
	s, other := acquire(t, pa, Policy{AllowInternet: true}), acquire(t, pb, Policy{AllowInternet: true})
	serve(t, guest(t, other), "tcp", "0.0.0.0:8000")
	answers(t, 0, "tcp", other.HostAddr.String()+":8000")
	blocked(t, guest(t, s), "tcp", other.HostAddr.String()+":8000")
	if err := RemoveAll(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	answers(t, 0, "tcp", other.HostAddr.String()+":8000")
}

// stripGuest takes off eth0 what gVisor takes off at a start.
func stripGuest(t *testing.T, ns netns.NsHandle) {
	t.Helper()
	err := inside(ns, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		eth, err := h.LinkByName(guestLink)
		if err != nil {
			return err
		}
		if err := h.AddrDel(eth, &netlink.Addr{IPNet: ipNet(GuestPrefix)}); err != nil {
			return err
		}
		return h.LinkSetDown(eth)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestBadTagsAreRefused(t *testing.T) {
	for _, tag := range []string{"", "abc", "ABCD", "abcde", "ab-c", "../x", "abcd\n"} {
		if _, err := Open(t.Context(), Config{Tag: tag}, nil); err == nil || !strings.Contains(err.Error(), "4 hex digits") {
			t.Errorf("Open with tag %q: %v", tag, err)
		}
		if err := RemoveAll(t.Context(), tag); err == nil {
			t.Errorf("RemoveAll with tag %q succeeded", tag)
		}
		if _, err := Leftovers(tag); err == nil {
			t.Errorf("Leftovers with tag %q succeeded", tag)
		}
	}
}

func TestListsAreWholeWhileOthersChangeTheHost(t *testing.T) {
	onBothKinds(t, testListsAreWholeWhileOthersChangeTheHost)
}

func testListsAreWholeWhileOthersChangeTheHost(t *testing.T, tap bool) {
	tag, otherTag := newTag(t), newTag(t)
	p, other := openPool(t, Config{TAP: tap, Tag: tag}), openPool(t, Config{TAP: tap, Tag: otherTag})
	acquire(t, p, Policy{})
	want := len(leftovers(t, tag))
	stop := make(chan struct{})
	var churn sync.WaitGroup
	for range 2 {
		churn.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				s, err := other.Acquire(t.Context(), Policy{AllowInternet: true})
				if err == nil {
					err = other.Release(t.Context(), s)
				}
				if err != nil {
					t.Errorf("churn: %v", err)
					return
				}
			}
		})
	}
	for range 300 {
		if got := leftovers(t, tag); len(got) != want {
			t.Errorf("listed %v, want %d things", got, want)
		}
	}
	close(stop)
	churn.Wait()
}
