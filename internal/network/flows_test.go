package network

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestAGuestDoesNotFillTheHostsTableOfConnections(t *testing.T) {
	onBothKinds(t, testAGuestDoesNotFillTheHostsTableOfConnections)
}

func testAGuestDoesNotFillTheHostsTableOfConnections(t *testing.T, tap bool) {
	tag := newTag(t)
	buildOutside(t, tag)
	p := openPool(t, Config{TAP: tap, Tag: tag, Resolver: netip.MustParseAddr(resolverAddr), Ready: 1})
	s := acquire(t, p, Policy{AllowInternet: true})
	g := guest(t, s)
	serve(t, g, "tcp", "0.0.0.0:8000")

	const flows = 4 * maxFlows
	before := trackedByHost(t)
	begin := time.Now()
	send := func() error {
		c, err := net.ListenPacket("udp4", ":0")
		if err != nil {
			return err
		}
		defer c.Close()
		for i := range flows {
			to := &net.UDPAddr{IP: net.ParseIP(publicAddr), Port: 1 + i%65000}
			// Refused once there are too many.
			_, _ = c.WriteTo([]byte("x"), to)
		}
		return nil
	}
	// What does not fit into a queue on the way is lost, so all are sent again until
	// enough have come through.
	for round := 0; round < 20 && trackedByHost(t)-before < maxFlows/2; round++ {
		if err := in(g, send); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d flows and more in %v", flows, time.Since(begin))
	if grown := trackedByHost(t) - before; grown < maxFlows/2 || grown > maxFlows*5/4 {
		t.Errorf("%d flows of a guest left %d entries with the host, want about %d", flows, grown, maxFlows)
	}
	answers(t, 0, "tcp", fmt.Sprint(s.HostAddr, ":8000")) // calls from outside are not the guest's doing
}

func trackedByHost(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
	if err != nil {
		t.Skip("connections are not counted here: ", err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}
