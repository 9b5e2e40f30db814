package e2e

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// connects is a Python program that tries to open a TCP connection and prints
// "open" or the error.
func connects(host string, port int) string {
	return fmt.Sprintf(`python3 -c '
import socket
try:
    socket.create_connection(("%s", %d), 3).close()
    print("open")
except OSError as e:
    print(type(e).__name__, e)'`, host, port)
}

func TestSandboxesReachNothingOfTheHostOrOfEachOther(t *testing.T) {
	t.Parallel()
	p := newPlatform(t)
	port := freePort(t)
	p.listen = fmt.Sprintf("0.0.0.0:%d", port) // on every address that the host has
	p.startAt(fmt.Sprintf("http://localhost:%d", port))
	attacker, victim := p.create(nil), p.create(nil)
	victim.background("exec python3 -m http.server 8000", false)
	eventually(t, 15*time.Second, "the victim serves", func() error {
		if status, body := victim.fetch(8000, "/"); status != 200 {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})

	targets := map[string]string{
		"its gateway":      connects("169.254.0.22", port),
		"metadata address": connects("169.254.169.254", 80),
	}
	for _, addr := range hostAddresses(t) {
		targets["the platform at "+addr] = connects(addr, port)
	}
	for i, addr := range slotAddresses(t, p) {
		targets[fmt.Sprintf("sandbox address %d, %s", i, addr)] = connects(addr, 8000)
		targets[fmt.Sprintf("agent at address %d, %s", i, addr)] = connects(addr, 49983)
	}
	for what, script := range targets {
		if got := attacker.run(script); strings.HasPrefix(got, "open") {
			t.Errorf("a sandbox reaches %s", what)
		}
	}
	if got := attacker.run(connects("127.0.0.1", port)); strings.HasPrefix(got, "open") {
		t.Error("a sandbox reaches the host's loopback")
	}
}

// hostAddresses are this host's own IPv4 addresses, but for the loopback.
func hostAddresses(t *testing.T) []string {
	t.Helper()
	all, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && !p.Addr().IsLoopback() {
			out = append(out, p.Addr().String())
		}
	}
	return out[:min(len(out), 6)]
}

// slotAddresses are the far ends of the platform's links: sandboxes' addresses
// as the host sees them.
func slotAddresses(t *testing.T, p *platform) []string {
	t.Helper()
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range links {
		if !strings.HasPrefix(l.Name, "w"+tag(p.dir)+"-") {
			continue
		}
		addrs, _ := l.Addrs()
		for _, a := range addrs {
			if near, err := netip.ParsePrefix(a.String()); err == nil && near.Addr().Is4() {
				out = append(out, near.Addr().Next().String())
			}
		}
	}
	if len(out) < 2 {
		t.Fatalf("the platform has two sandboxes and %d links with addresses", len(out))
	}
	return out[:min(len(out), 4)]
}

func TestDeniedInternetIsDenied(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	b := p.create(map[string]any{"allow_internet_access": false})
	for _, addr := range []string{"1.1.1.1", "8.8.8.8"} {
		if got := b.run(connects(addr, 443)); strings.HasPrefix(got, "open") {
			t.Errorf("reaches %s", addr)
		}
	}
	if r := b.try("timeout 10 getent ahosts example.com"); r.exit == 0 {
		t.Errorf("resolves names: %s", r.stdout)
	}
	// The way in stays open.
	b.background("exec python3 -m http.server 8000 -d /etc", false)
	eventually(t, 15*time.Second, "its own server is reached", func() error {
		if status, body := b.fetch(8000, "/hostname"); status != 200 {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
}

func TestSandboxUsesTheHostsInternet(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	index, err := exec.Command("python3", "-m", "pip", "config", "get", "global.index-url").Output()
	url := strings.TrimSpace(string(index))
	if err != nil || url == "" {
		url = defaultIndex()
	}
	client := &http.Client{Timeout: 20 * time.Second}
	resp, err := client.Head(url)
	if err != nil {
		t.Skipf("this host does not reach a package index, so a sandbox cannot either: %v", err)
	}
	resp.Body.Close()
	b := p.create(nil)
	if r := b.try("timeout 100 pip download -q --no-deps -d /tmp/dl idna && ls /tmp/dl"); r.exit != 0 || !strings.Contains(r.stdout, "idna") {
		t.Errorf("pip download in a sandbox, which the host can: %s", r)
	}
}

// defaultIndex asks pip where it looks for packages.
func defaultIndex() string {
	out, _ := exec.Command("python3", "-c", "from pip._internal.models.index import PyPI; print(PyPI.simple_url)").Output()
	return strings.TrimSpace(string(out))
}
