package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// browse runs a script of js/ that drives headless Chromium, with its cases as
// subtests. It is given the addresses of applications in all their forms.
func (w *web) browse(t *testing.T, b *box, script string, applications map[string][]form) {
	t.Helper()
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("needs a browser: apt-get install chromium")
	}
	dir, node := installJS(t)
	addresses := map[string]map[string]string{}
	for name, forms := range applications {
		addresses[name] = map[string]string{}
		for _, f := range forms {
			addresses[name][f.name] = f.url
		}
	}
	encoded, err := json.Marshal(addresses)
	if err != nil {
		t.Fatal(err)
	}
	_, plainPort, _ := net.SplitHostPort(w.listen)
	apart := filepath.Join(t.TempDir(), "chromium")
	start := fmt.Sprintf("#!/bin/sh\nexec nsenter --net=%s %s \"$@\"\n", networkApart(t, plainPort, w.tlsPort), chromium)
	if err := os.WriteFile(apart, []byte(start), 0o755); err != nil {
		t.Fatal(err)
	}
	report := filepath.Join(t.TempDir(), "report.xml")
	cmd := exec.Command(node, "--test", "--test-timeout=120000",
		"--test-reporter=spec", "--test-reporter-destination=stdout",
		"--test-reporter=junit", "--test-reporter-destination="+report, script)
	cmd.Dir = dir
	cmd.Env = w.environ("CHROMIUM="+apart, "CERTIFICATE="+w.certificate, "SANDBOX_ID="+b.id, "ADDRESSES="+string(encoded))
	runSuite(t, cmd, report)
}

// networkApart makes a network namespace whose loopback leads to the same ports of
// the host's, and returns its path. Chromium gives all its requests up
// (ERR_NETWORK_CHANGED) when any link of its namespace comes or goes, and on the
// host that happens with every sandbox.
func networkApart(t *testing.T, ports ...string) (path string) {
	t.Helper()
	var namespace *os.File
	listeners := make([]net.Listener, len(ports))
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this goroutine
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			lo, err := netlink.LinkByName("lo")
			if err == nil {
				err = netlink.LinkSetUp(lo)
			}
			for i := 0; i < len(ports) && err == nil; i++ {
				listeners[i], err = net.Listen("tcp", net.JoinHostPort("127.0.0.1", ports[i]))
			}
			if err == nil {
				namespace, err = os.Open("/proc/thread-self/ns/net")
			}
			return err
		}()
	}()
	if err := <-done; err != nil {
		t.Fatalf("make a network namespace for the browser: %v", err)
	}
	t.Cleanup(func() { namespace.Close() })
	for _, l := range listeners {
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go passOn(c, l.Addr().String())
			}
		}()
	}
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), namespace.Fd())
}

// passOn connects c with the server at addr until both directions have ended.
func passOn(c net.Conn, addr string) {
	defer c.Close()
	server, err := net.Dial("tcp", addr)
	if err != nil {
		return
	}
	defer server.Close()
	ended := make(chan error, 2)
	for _, way := range [][2]net.Conn{{c, server}, {server, c}} {
		go func() {
			_, err := io.Copy(way[0], way[1])
			ended <- errors.Join(err, way[0].(*net.TCPConn).CloseWrite())
		}()
	}
	if <-ended == nil {
		<-ended
	}
}
