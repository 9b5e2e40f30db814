package forward

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestPlan(t *testing.T) {
	outside := []netip.Addr{netip.MustParseAddr("169.254.0.21"), netip.MustParseAddr("fd00::21")}
	tests := map[string]struct {
		listeners []string // with "6 " before those that take IPv6 only
		want      map[string]string
	}{
		"nothing listens":                         {nil, nil},
		"an IPv4 listener takes both":             {[]string{"127.0.0.1:80"}, map[string]string{"169.254.0.21:80": "127.0.0.1:80", "[fd00::21]:80": "127.0.0.1:80"}},
		"an IPv6 listener takes both":             {[]string{"[::1]:80"}, map[string]string{"169.254.0.21:80": "[::1]:80", "[fd00::21]:80": "[::1]:80"}},
		"each family goes to its own":             {[]string{"127.0.0.1:80", "[::1]:80"}, map[string]string{"169.254.0.21:80": "127.0.0.1:80", "[fd00::21]:80": "[::1]:80"}},
		"the first loopback address is preferred": {[]string{"127.0.0.9:80", "127.0.0.1:80"}, map[string]string{"169.254.0.21:80": "127.0.0.1:80", "[fd00::21]:80": "127.0.0.1:80"}},
		"a reserved port is left alone":           {[]string{"127.0.0.1:49983"}, nil},
		"listeners outside need no forwarding":    {[]string{"0.0.0.0:80", "[::]:81", "169.254.0.21:82"}, nil},
		"all IPv4 addresses go before":            {[]string{"0.0.0.0:80", "127.0.0.1:80"}, map[string]string{"[fd00::21]:80": "127.0.0.1:80"}},
		"all addresses go before":                 {[]string{"[::]:80", "127.0.0.1:80"}, nil},
		"all IPv6 addresses go before there":      {[]string{"6 [::]:80", "127.0.0.1:80"}, map[string]string{"169.254.0.21:80": "127.0.0.1:80"}},
		"one address goes before":                 {[]string{"169.254.0.21:80", "127.0.0.1:80"}, map[string]string{"[fd00::21]:80": "127.0.0.1:80"}},
		"another port does not":                   {[]string{"0.0.0.0:81", "[::1]:80"}, map[string]string{"169.254.0.21:80": "[::1]:80", "[fd00::21]:80": "[::1]:80"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			var listeners []listener
			for _, s := range test.listeners {
				l := listener{}
				if s[:2] == "6 " {
					s, l.only6 = s[2:], true
				}
				l.addr = netip.MustParseAddrPort(s)
				listeners = append(listeners, l)
			}
			got := make(map[string]string)
			for from, to := range plan(listeners, outside, 49983) {
				got[from.String()] = to.String()
			}
			if diff := cmp.Diff(test.want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("paths differ (-want +got):\n%s", diff)
			}
		})
	}
}

const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 1500FEA9:0050 00000000:0000 0A
   2: 0100007F:1F90 0100007F:C350 01 00000000:00000000
   3: 0100007F:1F9 00000000:0000 0A
   4: 0100007:1F90 00000000:0000 0A
   5: 0100007G:1F90 00000000:0000 0A
   6: 0100007F:0000 00000000:0000 0A
   7: 0100007F
`

const table6 = `  sl  local_address                         remote_address                        st
   0: 00000000000000000000000001000000:0BB8 00000000000000000000000000000000:0000 0A 0
   1: 00000000000000000000000000000000:0BB9 00000000000000000000000000000000:0000 0A 0
   2: 0000000000000000FFFF00000100007F:0BBA 00000000000000000000000000000000:0000 0A 0`

func TestTheTablesOfTheSystemAreRead(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "tcp"), []byte(table), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "tcp6"), []byte(table6), 0o600))
	p, err := openProcNet(dir)
	must(t, err)
	defer p.close()
	p.buf = make([]byte, 16) // grows as it must
	got, _, err := p.listeners()
	must(t, err)
	var addrs []string
	for _, l := range got {
		addrs = append(addrs, l.addr.String())
	}
	want := []string{"127.0.0.1:3002", "127.0.0.1:8080", "169.254.0.21:80", "[::]:3001", "[::1]:3000"}
	if diff := cmp.Diff(want, addrs); diff != "" {
		t.Errorf("listeners differ (-want +got):\n%s", diff)
	}
}

func TestBothWaysOfListingAgree(t *testing.T) {
	w := newWorld(t, "redirect")
	for _, at := range []string{"127.0.0.1:3000", "[::1]:3000", "[::1]:3001", "0.0.0.0:3002", "[" + guest6 + "]:3003"} {
		w.listen(t, at)
	}
	must(t, w.in(w.guest, func() error {
		d, err := openDiag()
		if err != nil {
			return err
		}
		defer d.close()
		p, err := openProcNet("/proc/thread-self/net")
		if err != nil {
			return err
		}
		defer p.close()
		a, _, err := d.listeners()
		if err != nil {
			return err
		}
		b, _, err := p.listeners()
		if err != nil {
			return err
		}
		for i := range a {
			a[i].only6 = false // the files do not tell
		}
		if len(a) < 5 || !slices.Equal(a, b) {
			t.Errorf("socket diagnostics say %v,\nfiles say %v", a, b)
		}
		return nil
	}))
}

func FuzzTable(f *testing.F) {
	f.Add([]byte(table))
	f.Add([]byte(table6))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, l := range parseTable(nil, data) {
			if !l.addr.IsValid() || l.addr.Port() == 0 || l.addr.Addr().Is4In6() {
				t.Errorf("listener %v", l)
			}
		}
	})
}

func FuzzDiagMessage(f *testing.F) {
	message := make([]byte, messageSize+8)
	message[0], message[1] = 10, stateListen
	message[messageSize], message[messageSize+2], message[messageSize+4] = 5, attrOnly6, 1
	f.Add(message)
	f.Fuzz(func(t *testing.T, data []byte) {
		if l, ok := parseDiag(data); ok && !l.addr.IsValid() {
			t.Errorf("listener %v", l)
		}
	})
}
