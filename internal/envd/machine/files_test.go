package machine

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestTheUsersLinesOfAHostsFileAreKept(t *testing.T) {
	addr := netip.MustParseAddr("169.254.0.21")
	ours := func(lines string) string { return blockBegin + lines + "169.254.0.21\tnew\n" + blockEnd }
	const v4, v6 = "127.0.0.1\tlocalhost\n", "::1\tlocalhost ip6-localhost ip6-loopback\n"
	for name, tc := range map[string]struct{ old, want string }{
		"none yet":                       {"", ours(v4 + v6)},
		"with loopback":                  {"127.0.0.1 x localhost\n::1 localhost\n", "127.0.0.1 x localhost\n::1 localhost\n" + ours("")},
		"loopback in a comment":          {"#127.0.0.1 localhost\n", "#127.0.0.1 localhost\n" + ours(v4+v6)},
		"no line break at the end":       {"10.0.0.1 a", "10.0.0.1 a\n" + ours(v4+v6)},
		"ours of before, lines around":   {"10.0.0.1 a\n" + blockBegin + "x\n" + blockEnd + "10.0.0.2 b\n", "10.0.0.1 a\n" + ours(v4+v6) + "10.0.0.2 b\n"},
		"ours twice":                     {blockBegin + blockEnd + blockBegin + blockEnd, ours(v4 + v6)},
		"the end of ours cut off":        {blockBegin + "10.0.0.2 b\n", ours(v4+v6) + "10.0.0.2 b\n"},
		"the same again changes nothing": {ours(v4 + v6), ours(v4 + v6)},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "etc/hosts")
			if tc.old != "" {
				os.Mkdir(filepath.Dir(path), 0o755)
				os.WriteFile(path, []byte(tc.old), 0o644)
			}
			if err := WriteHosts(path, []Alias{{addr, "new"}}); err != nil {
				t.Fatal(err)
			}
			if got, _ := os.ReadFile(path); string(got) != tc.want {
				t.Errorf("got\n%s\nwant\n%s", got, tc.want)
			}
		})
	}
}

// certificate returns one that signs itself, in PEM.
func certificate(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestAuthoritiesAreReplacedInEveryBundleAndNotPiledUp(t *testing.T) {
	root := t.TempDir()
	debian, fedora := filepath.Join(root, bundles[0]), filepath.Join(root, bundles[1])
	for _, path := range []string{debian, fedora} {
		os.MkdirAll(filepath.Dir(path), 0o755)
		os.WriteFile(path, []byte("the image's\n"), 0o644)
	}
	os.Symlink("certs/ca-certificates.crt", filepath.Join(root, "etc/ssl/cert.pem")) // as Alpine has it
	var last string
	for range 3 {
		last = certificate(t)
		plain, err := ParseAuthorities("a comment\n" + last + certificate(t))
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := TrustAuthorities(root, plain); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, path := range []string{debian, fedora} {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text := string(data)
		if !strings.HasPrefix(text, "the image's\n") || strings.Count(text, "BEGIN CERTIFICATE") != 2 || !strings.Contains(text, last) {
			t.Errorf("%s holds\n%s", path, text)
		}
		if pool := x509.NewCertPool(); !pool.AppendCertsFromPEM(data) {
			t.Errorf("%s is no bundle", path)
		}
	}
	if fi, _ := os.Lstat(filepath.Join(root, "etc/ssl/cert.pem")); fi.Mode()&os.ModeSymlink == 0 {
		t.Error("a link became a file")
	}
	bare := t.TempDir()
	if err := TrustAuthorities(bare, last); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(bare, bundles[0])); err != nil || !strings.Contains(string(data), last) {
		t.Errorf("an image without authorities got %q, %v", data, err)
	}
}

func TestWhatIsNoCertificateIsRefused(t *testing.T) {
	good := certificate(t)
	for name, text := range map[string]string{
		"nothing":             "",
		"words":               "trust me",
		"a key":               "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
		"a key behind":        good + "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
		"rubbish in PEM":      "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"one that is cut off": good + good[:len(good)/2],
		"too much":            strings.Repeat(good, MaxAuthorities/len(good)+1),
	} {
		if got, err := ParseAuthorities(text); err == nil {
			t.Errorf("%s: taken as %d bytes", name, len(got))
		}
	}
}

func FuzzParseAuthorities(f *testing.F) {
	f.Add("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
	f.Add("-----BEGIN CERTIFICATE-----\nh: v\n\nAAAA\n-----END CERTIFICATE-----")
	f.Add("x")
	f.Fuzz(func(t *testing.T, text string) {
		plain, err := ParseAuthorities(text)
		if err != nil {
			return
		}
		if again, err := ParseAuthorities(plain); err != nil || again != plain {
			t.Errorf("what was taken is not taken again: %v", err)
		}
		if strings.Contains(plain, "Wrenn") {
			t.Errorf("it could end the agent's lines: %q", plain)
		}
	})
}

func FuzzParseParams(f *testing.F) {
	f.Add("quiet wrenn.ip=10.0.0.2/30 wrenn.gateway=10.0.0.1 wrenn.dns=1.1.1.1,, reboot=k")
	f.Add("wrenn.hostname=-x wrenn.hostname=a.b wrenn.mtu=99999999999999999999 wrenn.mmds=maybe wrenn.")
	f.Add("wrenn.link=../eth0 wrenn.poweroff= -- wrenn.mmds=1")
	f.Fuzz(func(t *testing.T, line string) {
		p := parseParams(line, true)
		if p.Hostname != "" && !validName(p.Hostname) || !p.Address.IsValid() || !p.Gateway.IsValid() || len(p.Resolvers) == 0 ||
			p.Link == "" || strings.Contains(p.Link, "/") || p.MTU != 0 && (p.MTU < 576 || p.MTU > 65535) {
			t.Errorf("%q gave %+v", line, p)
		}
	})
}

func TestHowTheMachineEndsIsTheHostsToSay(t *testing.T) {
	for _, tc := range []struct {
		line string
		acpi bool
		want bool
	}{
		{"", true, false}, {"", false, true}, {"reboot=k panic=1", true, true}, {"reboot=acpi,k", true, true},
		{"reboot=t", true, false}, {"reboot=k wrenn.poweroff=off", true, false}, {"wrenn.poweroff=restart", true, true},
		{"wrenn.poweroff=never", true, false},
	} {
		if got := parseParams(tc.line, tc.acpi).Restart; got != tc.want {
			t.Errorf("%q, ACPI %v: restart is %v", tc.line, tc.acpi, got)
		}
	}
}

func TestTheConsoleIsBoundedAndNeverWaitedFor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	c := OpenConsole(path)
	defer unix.Close(c.fd)
	now := time.Unix(1000, 0)
	c.now, c.last = func() time.Time { return now }, now
	line := append(bytes.Repeat([]byte("x"), 99), '\n')
	write := func(lines int) (arrived int) {
		for range lines {
			if n, err := c.Write(line); n != len(line) || err != nil {
				t.Fatalf("write: %d, %v", n, err)
			}
		}
		buf := make([]byte, 1<<20)
		n, _ := unix.Read(fd, buf)
		return max(n, 0)
	}
	if got := write(10_000); got > consoleBurst || got < consoleBurst-len(line) {
		t.Errorf("of a flood %d bytes arrived", got)
	}
	if got := write(10); got != 0 {
		t.Errorf("after it %d bytes", got)
	}
	now = now.Add(time.Second)
	if got := write(100); got > consoleRate+len(line) || got < consoleRate-len(line) {
		t.Errorf("a second later %d bytes", got)
	}
	now = now.Add(time.Hour)
	for range 100 { // nobody reads: the pipe fills up
		now = now.Add(time.Minute)
		for range 160 {
			c.Write(line)
		}
	}
}

func TestTheKernelTakesTheEntropy(t *testing.T) {
	fresh := make([]byte, 64)
	rand.Read(fresh)
	for name, entropy := range map[string][]byte{"none": nil, "as the host sends it": fresh, "an odd number": fresh[:7], "too much": make([]byte, MaxEntropy+1)} {
		if err := Reseed(entropy); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
