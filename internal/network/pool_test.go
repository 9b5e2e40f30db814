package network

import (
	"errors"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if crashTag != "" {
		runUntilKilled(crashTag)
	}
	if monitorTask != "" {
		runAsMonitor(monitorTask)
	}
	goleak.VerifyTestMain(m)
}

func TestCloseLeavesNothingOnTheHost(t *testing.T) { onBothKinds(t, testCloseLeavesNothingOnTheHost) }

func testCloseLeavesNothingOnTheHost(t *testing.T, tap bool) {
	tag := newTag(t)
	p := openPool(t, Config{TAP: tap, Tag: tag, Ready: 3})
	s := acquire(t, p, Policy{AllowInternet: true})
	if err := p.Release(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if err := p.Release(t.Context(), s); err != nil {
		t.Errorf("second Release: %v", err)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := leftovers(t, tag); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := p.Acquire(t.Context(), Policy{}); !errors.Is(err, ErrClosed) {
		t.Errorf("Acquire after Close: %v, want ErrClosed", err)
	}
}

func TestCloseKeepsSlotsInUse(t *testing.T) { onBothKinds(t, testCloseKeepsSlotsInUse) }

func testCloseKeepsSlotsInUse(t *testing.T, tap bool) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	serve(t, outside, "tcp", publicAddr+":80")
	serve(t, outside, "tcp", privateAddr+":80")
	p := openPool(t, Config{TAP: tap, Tag: tag, Ready: 2})
	s := acquire(t, p, Policy{AllowInternet: true})
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	g := guest(t, s)
	answers(t, g, "tcp", publicAddr+":80")
	blocked(t, g, "tcp", privateAddr+":80")
	want := []string{"netns " + filepath.Base(s.NetNS)}
	if !tap {
		want = append(want, "netns "+filepath.Base(s.InnerNetNS))
	}
	want = append(want,
		"link "+linkName(tag, s.Index), "nftables table "+tableName(tag),
		"route unreachable "+p.CIDR().String(),
	)
	if left := leftovers(t, tag); !slices.Equal(left, want) {
		t.Errorf("left on the host: %v, want %v", left, want)
	}
	if err := RemoveAll(t.Context(), tag); err != nil {
		t.Fatal(err)
	}
}

func TestRemoveAllRemovesSlotsInUse(t *testing.T) { onBothKinds(t, testRemoveAllRemovesSlotsInUse) }

func testRemoveAllRemovesSlotsInUse(t *testing.T, tap bool) {
	tag := newTag(t)
	p := openPool(t, Config{TAP: tap, Tag: tag})
	acquire(t, p, Policy{})
	acquire(t, p, Policy{AllowInternet: true})
	for range 2 {
		if err := RemoveAll(t.Context(), tag); err != nil {
			t.Fatal(err)
		}
		if left := leftovers(t, tag); len(left) > 0 {
			t.Errorf("left on the host: %v", left)
		}
	}
}

func TestManyCyclesInParallelLeakNothing(t *testing.T) {
	onBothKinds(t, testManyCyclesInParallelLeakNothing)
}

func testManyCyclesInParallelLeakNothing(t *testing.T, tap bool) {
	tag := newTag(t)
	p := openPool(t, Config{TAP: tap, Tag: tag, Ready: 4})
	const workers, cycles = 8, 25
	var mu sync.Mutex
	held := map[netip.Addr]bool{}
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			for n := range cycles {
				s, err := p.Acquire(t.Context(), Policy{AllowInternet: n%2 == 0})
				if err != nil {
					t.Errorf("Acquire: %v", err)
					return
				}
				mu.Lock()
				if held[s.HostAddr] {
					t.Errorf("%s was given out twice", s.HostAddr)
				}
				held[s.HostAddr] = true
				mu.Unlock()
				if err := s.Prepare(); err != nil {
					t.Errorf("Prepare: %v", err)
				}
				mu.Lock()
				delete(held, s.HostAddr)
				mu.Unlock()
				// Twice at once: both must return only when the slot is gone.
				var both sync.WaitGroup
				for range 2 {
					both.Go(func() {
						if err := p.Release(t.Context(), s); err != nil {
							t.Errorf("Release: %v", err)
						}
						if isNamespace(s.NetNS) {
							t.Errorf("slot %d is still there after Release", s.Index)
						}
					})
				}
				both.Wait()
			}
		})
	}
	group.Wait()
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if left := leftovers(t, tag); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
}

func TestAFullRangeIsAnErrorUntilASlotIsReleased(t *testing.T) {
	onBothKinds(t, testAFullRangeIsAnErrorUntilASlotIsReleased)
}

func testAFullRangeIsAnErrorUntilASlotIsReleased(t *testing.T, tap bool) {
	tag := newTag(t)
	p := openPool(t, Config{TAP: tap, Tag: tag, CIDR: netip.MustParsePrefix("10.254.66.8/30")})
	first := acquire(t, p, Policy{})
	second := acquire(t, p, Policy{})
	if first.HostAddr.String() != "10.254.66.9" || second.HostAddr.String() != "10.254.66.11" {
		t.Errorf("addresses %s and %s", first.HostAddr, second.HostAddr)
	}
	if _, err := p.Acquire(t.Context(), Policy{}); !errors.Is(err, ErrNoFreeSlot) {
		t.Fatalf("Acquire: %v, want ErrNoFreeSlot", err)
	}
	if err := p.Release(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if again := acquire(t, p, Policy{}); again.HostAddr != first.HostAddr {
		t.Errorf("got %s, want the freed %s", again.HostAddr, first.HostAddr)
	}
}

func TestFirstPacketOfANewSlotIsNotLost(t *testing.T) {
	onBothKinds(t, testFirstPacketOfANewSlotIsNotLost)
}

func testFirstPacketOfANewSlotIsNotLost(t *testing.T, tap bool) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	serve(t, outside, "tcp", publicAddr+":80")
	p := openPool(t, Config{TAP: tap, Tag: tag, Resolver: netip.MustParseAddr(resolverAddr)})
	for range 40 {
		s := acquire(t, p, Policy{AllowInternet: true})
		start := time.Now()
		answers(t, guest(t, s), "tcp", publicAddr+":80")
		if d := time.Since(start); d > 500*time.Millisecond {
			t.Errorf("first connection took %v", d)
		}
		if err := p.Release(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPrepareRestoresWhatTheRuntimeTookOff(t *testing.T) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	serve(t, outside, "tcp", publicAddr+":80")
	p := openPool(t, Config{Tag: tag})
	s := acquire(t, p, Policy{AllowInternet: true})
	g := guest(t, s)
	stripGuest(t, g)
	blocked(t, g, "tcp", publicAddr+":80")
	for range 2 {
		if err := s.Prepare(); err != nil {
			t.Fatal(err)
		}
		answers(t, g, "tcp", publicAddr+":80")
	}
}

func TestPrepareOfAReleasedSlotIsAnError(t *testing.T) {
	onBothKinds(t, testPrepareOfAReleasedSlotIsAnError)
}

func testPrepareOfAReleasedSlotIsAnError(t *testing.T, tap bool) {
	p := openPool(t, Config{TAP: tap, Tag: newTag(t)})
	s := acquire(t, p, Policy{})
	if err := p.Release(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if err := s.Prepare(); err == nil {
		t.Error("Prepare succeeded")
	}
	if err := p.SetPolicy(t.Context(), s, Policy{}); err == nil {
		t.Error("SetPolicy succeeded")
	}
}

func TestAFailedCreateLeavesNothing(t *testing.T) { onBothKinds(t, testAFailedCreateLeavesNothing) }

func testAFailedCreateLeavesNothing(t *testing.T, tap bool) {
	tag := newTag(t)
	// Namespaces and links come about before the kernel refuses this address.
	s := newSlot(tag, 7, netip.MustParseAddr("2001:db8::1"), tap)
	if err := createSlot(tag, s, netip.Addr{}); err == nil {
		t.Fatal("createSlot succeeded")
	}
	if left := leftovers(t, tag); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
}

// TestCostOfASlot prints what preparing and removing a slot takes.
func TestCostOfASlot(t *testing.T) { onBothKinds(t, testCostOfASlot) }

func testCostOfASlot(t *testing.T, tap bool) {
	tag := newTag(t)
	p := openPool(t, Config{TAP: tap, Tag: tag})
	var create, policy, prepare, destroy []time.Duration
	timed := func(to *[]time.Duration, fn func() error) {
		start := time.Now()
		if err := fn(); err != nil {
			t.Fatal(err)
		}
		*to = append(*to, time.Since(start))
	}
	for range 30 {
		var s *Slot
		timed(&create, func() (err error) {
			s, err = p.Acquire(t.Context(), Policy{AllowInternet: true})
			return err
		})
		timed(&policy, func() error { return p.SetPolicy(t.Context(), s, Policy{}) })
		timed(&prepare, s.Prepare)
		timed(&destroy, func() error { return p.Release(t.Context(), s) })
	}
	for _, r := range []struct {
		what string
		took []time.Duration
	}{{"create", create}, {"set policy", policy}, {"prepare", prepare}, {"remove", destroy}} {
		slices.Sort(r.took)
		t.Logf("%-10s p50 %v, max %v", r.what, r.took[len(r.took)/2].Round(10*time.Microsecond), r.took[len(r.took)-1].Round(10*time.Microsecond))
	}
}
