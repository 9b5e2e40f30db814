package forward

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// entriesOf walks a table as a kernel does, and tells what each entry redirects.
func entriesOf(t *testing.T, table natTable) (redirected []string) {
	t.Helper()
	u16 := binary.NativeEndian.Uint16
	u32 := binary.NativeEndian.Uint32
	head, rest := table.blob[:replaceSize], table.blob[replaceSize:]
	if u32(head[40:]) != uint32(len(rest)) || u32(head[36:]) != table.entries {
		t.Fatalf("the head says %d entries of %d bytes, want %d of %d", u32(head[36:]), u32(head[40:]), table.entries, len(rest))
	}
	starts := map[uint32]string{} // of entries: the name of their target
	offset, n := uint32(0), uint32(0)
	for ; len(rest) > 0; n++ {
		target, next := u16(rest[88:]), u16(rest[90:])
		entry := rest[:next]
		for at := uint16(entrySize); at < target; at += u16(entry[at:]) {
			if match := entry[at:]; strings.HasPrefix(string(match[2:]), "multiport\x00") {
				for i := range int(match[33]) {
					addr := netip.AddrFrom4([4]byte(entry[4:8]))
					redirected = append(redirected, netip.AddrPortFrom(addr, u16(match[34+2*i:])).String())
				}
			}
		}
		if size := u16(entry[target:]); target+size != next {
			t.Fatalf("entry %d: a target of %d bytes at %d, but the entry has %d", n, size, target, next)
		}
		starts[offset] = strings.TrimRight(string(entry[target+2:target+31]), "\x00")
		offset += uint32(next)
		rest = rest[next:]
	}
	if n != table.entries {
		t.Fatalf("%d entries, want %d", n, table.entries)
	}
	for _, hook := range natHooks {
		start, end := u32(head[44+4*hook:]), u32(head[64+4*hook:])
		first, ok := starts[start]
		last, okLast := starts[end]
		if !ok || !okLast || last != "" || (hook != 0 && first != "") {
			t.Errorf("hook %d goes from %q at %d to %q at %d, want it to end with an entry that accepts", hook, first, start, last, end)
		}
	}
	return redirected
}

func TestATableRedirectsExactlyWhatItIsAskedFor(t *testing.T) {
	var many []netip.AddrPort
	for port := range uint16(40) {
		many = append(many, netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), 1000+2*port))
	}
	many = append(many, netip.MustParseAddrPort("169.254.0.21:65535"))
	for _, want := range [][]netip.AddrPort{nil, many[:1], many[:15], many[:16], many} {
		t.Run(fmt.Sprint(len(want)), func(t *testing.T) {
			if got := entriesOf(t, newTable(want, 49984)); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("it redirects %v, want %v", got, want)
			}
		})
	}
}

func TestATableOfAllPortsIsNotTooLarge(t *testing.T) {
	var all []netip.AddrPort
	for port := range 65535 {
		all = append(all, netip.AddrPortFrom(netip.MustParseAddr("169.254.0.21"), uint16(port+1)))
	}
	table := newTable(all, 49984)
	if n := len(table.blob); n > 32<<10 {
		t.Errorf("it has %d bytes, gVisor takes 32 KiB", n)
	}
	if got := entriesOf(t, table); len(got) != maxEntries*matchPorts || got[0] != "169.254.0.21:1" {
		t.Errorf("it redirects %d from %s on, want the first %d", len(got), got[0], maxEntries*matchPorts)
	}
}

// On Linux the table may be somebody else's.
func TestTheOlderInterfaceIsNotUsedOnLinux(t *testing.T) {
	w := newWorld(t, "redirect")
	must(t, w.in(w.guest, func() error {
		if r, err := newIPTables(49984); err == nil {
			r.close()
			return errors.New("it can be used")
		}
		return nil
	}))
}
