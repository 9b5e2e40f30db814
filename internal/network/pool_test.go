package network

import (
	"net/netip"
	"testing"
)

func TestTrafficReachesWhatThePolicyAllows(t *testing.T) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	p := openPool(t, Config{Tag: tag, Resolver: netip.MustParseAddr(resolverAddr), Ready: 1})
	s := acquire(t, p, Policy{AllowInternet: true})
	g := guest(t, s)
	for _, network := range []string{"tcp", "udp"} {
		serve(t, g, network, "0.0.0.0:8000")
		serve(t, outside, network, publicAddr+":80")
		answers(t, 0, network, s.HostAddr.String()+":8000")
		if seen := answers(t, g, network, publicAddr+":80"); seen != "198.51.100.1" {
			t.Errorf("the internet saw %s, want the host's address", seen)
		}
	}
}
