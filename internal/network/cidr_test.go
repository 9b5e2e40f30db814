package network

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestARangeThatMeetsARouteOfTheHostIsRefused(t *testing.T) {
	tag := newTag(t)
	buildOutside(t, tag) // routes 10.253.7.0/24
	for _, cidr := range []string{"10.253.0.0/16", "10.253.7.64/26", "10.253.7.0/24"} {
		_, err := Open(t.Context(), Config{Tag: tag, CIDR: netip.MustParsePrefix(cidr)}, nil)
		if err == nil {
			t.Errorf("Open with %s succeeded", cidr)
			continue
		}
		for _, word := range []string{cidr, "10.253.7.", "x" + tag, "--network-cidr"} {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("error %q does not name %s", err, word)
			}
		}
	}
	for _, cidr := range []string{"10.0.0.0/4", "10.254.66.0/31", "fd00::/64"} {
		if _, err := Open(t.Context(), Config{Tag: tag, CIDR: netip.MustParsePrefix(cidr)}, nil); err == nil {
			t.Errorf("Open with %s succeeded", cidr)
		}
	}
	if left := leftovers(t, tag); len(left) > 0 {
		t.Errorf("a refused Open left %v", left)
	}
}

func TestTheRangeStaysTheSameOverARestart(t *testing.T) {
	onBothKinds(t, testTheRangeStaysTheSameOverARestart)
}

func testTheRangeStaysTheSameOverARestart(t *testing.T, tap bool) {
	tag := newTag(t)
	first, err := Open(t.Context(), Config{TAP: tap, Tag: tag}, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := acquire(t, first, Policy{}) // in use, so that Close leaves it
	if err := first.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	again := openPool(t, Config{TAP: tap, Tag: tag}, s.Index)
	if again.CIDR() != first.CIDR() {
		t.Errorf("got %s, then %s", first.CIDR(), again.CIDR())
	}
	other := acquire(t, again, Policy{})
	if other.Index == s.Index || other.HostAddr == s.HostAddr {
		t.Errorf("slot %d (%s) was given out again", other.Index, other.HostAddr)
	}
}

func TestSlotsOfAnotherRangeStayInUseAfterItIsChanged(t *testing.T) {
	onBothKinds(t, testSlotsOfAnotherRangeStayInUseAfterItIsChanged)
}

func testSlotsOfAnotherRangeStayInUseAfterItIsChanged(t *testing.T, tap bool) {
	tag := newTag(t)
	first := openPool(t, Config{TAP: tap, Tag: tag, CIDR: netip.MustParsePrefix("10.254.66.0/24")})
	s := acquire(t, first, Policy{AllowInternet: true})
	serve(t, guest(t, s), "tcp", "0.0.0.0:8000")
	again := openPool(t, Config{TAP: tap, Tag: tag, CIDR: netip.MustParsePrefix("10.254.67.0/24")}, s.Index)
	adopted, ok := again.Adopted(s.Index)
	if !ok || adopted.HostAddr != s.HostAddr {
		t.Fatalf("adopted %v, %v; want address %s", adopted, ok, s.HostAddr)
	}
	answers(t, 0, "tcp", adopted.HostAddr.String()+":8000")
	if other := acquire(t, again, Policy{}); !again.CIDR().Contains(other.HostAddr) {
		t.Errorf("new slot has %s, want one of %s", other.HostAddr, again.CIDR())
	}
}

func TestClash(t *testing.T) {
	routes := []hostRoute{{netip.MustParsePrefix("10.8.0.0/16"), "tun0"}, {netip.MustParsePrefix("192.0.2.0/24"), "eth0"}}
	for _, c := range []struct {
		cidr string
		link string
	}{
		{"10.8.4.0/24", "tun0"},
		{"10.0.0.0/8", "tun0"},
		{"192.0.2.2/32", "eth0"},
		{"10.9.0.0/16", ""},
		{"192.0.3.0/24", ""},
	} {
		if r, _ := clash(netip.MustParsePrefix(c.cidr), routes); r.link != c.link {
			t.Errorf("%s meets the route over %q, want %q", c.cidr, r.link, c.link)
		}
	}
}

func TestHostResolverIsTheFirstThatSlotsCanUse(t *testing.T) {
	for name, c := range map[string]struct {
		first, second string
		want          string
	}{
		"plain":                   {"search example.org\nnameserver 10.1.1.1\nnameserver 10.1.1.2\n", "", "10.1.1.1"},
		"after the loopback":      {"nameserver 127.0.0.1\nnameserver ::1\nnameserver\t10.1.1.1 # office", "", "10.1.1.1"},
		"from the second file":    {"nameserver 127.0.0.53\noptions edns0\n", "nameserver 10.1.1.1\n", "10.1.1.1"},
		"IPv4 written as IPv6":    {"nameserver ::ffff:10.1.1.1\n", "", "10.1.1.1"},
		"none":                    {"nameserver 127.0.0.53\n", "nameserver 2001:db8::1\n", ""},
		"junk":                    {"nameserver\nnameserver x\n;nameserver 10.1.1.9\n#nameserver 10.1.1.9\n", "\x00", ""},
		"no file":                 {"", "", ""},
		"unspecified is loopback": {"nameserver 0.0.0.0\n", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			files := []string{filepath.Join(dir, "a"), filepath.Join(dir, "b")}
			for i, text := range []string{c.first, c.second} {
				if text == "" {
					continue
				}
				if err := os.WriteFile(files[i], []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got, ok := hostResolver(files...)
			if ok != (c.want != "") || (ok && got.String() != c.want) {
				t.Errorf("got %v, %v; want %q", got, ok, c.want)
			}
		})
	}
}
