package server_test

import (
	"fmt"
	"net"
	"testing"

	"github.com/wrenn/wrenn/internal/server"
)

func TestListen(t *testing.T) {
	addrs := func(ls []net.Listener) (as []*net.TCPAddr) {
		for _, l := range ls {
			t.Cleanup(func() { l.Close() })
			as = append(as, l.Addr().(*net.TCPAddr))
		}
		return as
	}
	listen := func(addr string) []*net.TCPAddr {
		t.Helper()
		ls, err := server.Listen(addr)
		if err != nil {
			t.Fatal(err)
		}
		return addrs(ls)
	}
	ipv6 := func() bool {
		l, err := net.Listen("tcp", "[::1]:0")
		if err == nil {
			l.Close()
		}
		return err == nil
	}()

	t.Run("localhost is both families on one port", func(t *testing.T) {
		got := listen("localhost:0")
		if !ipv6 {
			t.Skip("no IPv6 on this machine")
		}
		if len(got) != 2 || got[0].IP.String() != "127.0.0.1" || got[1].IP.String() != "::1" || got[0].Port != got[1].Port || got[0].Port == 0 {
			t.Errorf("listens on %v", got)
		}
	})
	t.Run("an address is itself alone", func(t *testing.T) {
		if got := listen("127.0.0.3:0"); len(got) != 1 || got[0].IP.String() != "127.0.0.3" {
			t.Errorf("listens on %v", got)
		}
	})
	t.Run("no host is everywhere", func(t *testing.T) {
		got := listen(":0")
		for _, host := range []string{"127.0.0.1", "::1"} {
			if host == "::1" && !ipv6 {
				continue
			}
			c, err := net.Dial("tcp", net.JoinHostPort(host, fmt.Sprint(got[0].Port)))
			if err != nil {
				t.Errorf("%s: %v", host, err)
				continue
			}
			c.Close()
		}
	})
	t.Run("a port taken on one family is an error", func(t *testing.T) {
		if !ipv6 {
			t.Skip("no IPv6 on this machine")
		}
		taken := listen("[::1]:0")
		ls, err := server.Listen(fmt.Sprintf("localhost:%d", taken[0].Port))
		addrs(ls)
		if err == nil {
			t.Error("no error")
		}
	})
	for _, bad := range []string{"", "localhost", "localhost:x", "1.2.3.4.5:80", "localhost:70000"} {
		if ls, err := server.Listen(bad); err == nil {
			addrs(ls)
			t.Errorf("%q: no error", bad)
		}
	}
}
