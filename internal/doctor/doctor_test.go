package doctor

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// fakeHost makes a host whose files are these.
func fakeHost(t *testing.T, files map[string]string) host {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return host{root: root}
}

const (
	v1Mounts = `30 24 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
`
	v2Mounts = "30 24 0:26 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
)

func TestVerdictsOnHostsOfManyKinds(t *testing.T) {
	tests := []struct {
		name  string
		check func(host) Result
		files map[string]string
		want  Verdict
	}{
		{"a kernel of today", host.kernel, map[string]string{"proc/sys/kernel/osrelease": "6.1.0-35-amd64\n"}, OK},
		{"the oldest kernel that will do", host.kernel, map[string]string{"proc/sys/kernel/osrelease": "4.15.0"}, OK},
		{"a kernel that is too old", host.kernel, map[string]string{"proc/sys/kernel/osrelease": "4.14.300"}, Fail},
		{"a kernel of another major", host.kernel, map[string]string{"proc/sys/kernel/osrelease": "3.99.0"}, Fail},
		{"no /proc", host.kernel, nil, Warn},

		{"seccomp with every action", host.seccomp, map[string]string{"proc/sys/kernel/seccomp/actions_avail": "kill_process trap errno trace log allow"}, OK},
		{"seccomp without trap", host.seccomp, map[string]string{"proc/sys/kernel/seccomp/actions_avail": "kill_process errno trace"}, Fail},
		{"no seccomp", host.seccomp, nil, Fail},

		{"yama forbids tracing", host.ptrace, map[string]string{"proc/sys/kernel/yama/ptrace_scope": "3\n"}, Fail},
		{"yama restricts tracing", host.ptrace, map[string]string{"proc/sys/kernel/yama/ptrace_scope": "2\n"}, OK},
		{"no yama", host.ptrace, nil, OK},

		{"cgroup v1 with all controllers", host.cgroups, map[string]string{"proc/self/mountinfo": v1Mounts}, OK},
		{"cgroup v1 without memory", host.cgroups, map[string]string{"proc/self/mountinfo": v1Mounts[:len(v1Mounts)/2]}, Fail},
		{"cgroup v2 with all controllers", host.cgroups, map[string]string{
			"proc/self/mountinfo": v2Mounts, "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids"}, OK},
		{"cgroup v2 without pids", host.cgroups, map[string]string{
			"proc/self/mountinfo": v2Mounts, "sys/fs/cgroup/cgroup.controllers": "cpu memory"}, Fail},
		{"cgroup v2 mounted read-only", host.cgroups, map[string]string{
			"proc/self/mountinfo":              "30 24 0:26 / /sys/fs/cgroup ro,relatime - cgroup2 cgroup2 rw\n",
			"sys/fs/cgroup/cgroup.controllers": "cpu memory pids"}, Fail},
		{"mounts that make no sense", host.cgroups, map[string]string{"proc/self/mountinfo": "30 24\n"}, Fail},

		{"a resolver in the network", host.resolver, map[string]string{"etc/resolv.conf": "search x\nnameserver 192.0.2.1\n"}, OK},
		{"systemd-resolved", host.resolver, map[string]string{
			"etc/resolv.conf": "nameserver 127.0.0.53\n", "run/systemd/resolve/resolv.conf": "nameserver 192.0.2.1\n"}, OK},
		{"a resolver on the loopback", host.resolver, map[string]string{"etc/resolv.conf": "nameserver 127.0.0.1\n"}, Warn},
		{"a resolver of IPv6 alone", host.resolver, map[string]string{"etc/resolv.conf": "nameserver 2001:db8::1\n"}, Warn},
		{"a broken resolv.conf", host.resolver, map[string]string{"etc/resolv.conf": "nameserver\nnameserver x\n"}, Warn},

		{"forwarding off", host.forwarding, map[string]string{"proc/sys/net/ipv4/ip_forward": "0\n"}, Warn},
		{"forwarding on", host.forwarding, map[string]string{"proc/sys/net/ipv4/ip_forward": "1\n"}, OK},

		{"no virtualisation", host.kvm, nil, Warn},
		{"something else at /dev/kvm", host.kvm, map[string]string{"dev/kvm": ""}, Warn},
		{"no TUN/TAP", host.tap, nil, Warn},
		{"TUN/TAP", host.tap, map[string]string{"dev/net/tun": ""}, OK},

		{"plenty of memory", host.memory, map[string]string{"proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n"}, OK},
		{"little memory", host.memory, map[string]string{"proc/meminfo": "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n"}, Warn},
		{"hardly any memory", host.memory, map[string]string{"proc/meminfo": "MemTotal: 262144 kB\nMemAvailable: 100000 kB\n"}, Fail},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.check(fakeHost(t, tt.files))
			if got.Verdict != tt.want {
				t.Errorf("got %+v, want verdict %s", got, tt.want)
			}
			if (got.Remedy == "") != (got.Verdict == OK) {
				t.Errorf("%+v: want a remedy exactly when something is wrong", got)
			}
		})
	}
}

func TestThisHostPassesAsRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes a network namespace")
	}
	for _, r := range Check(t.Context(), Options{DataDir: t.TempDir(), Listen: "localhost:0"}) {
		t.Logf("%-18s %-4s %s", r.Name, r.Verdict, r.Detail)
		if r.Verdict == Fail {
			t.Errorf("%s: %s (%s)", r.Name, r.Detail, r.Remedy)
		}
	}
}

func TestTheGuestKernelIsFoundInTheDataDirectory(t *testing.T) {
	dir := t.TempDir()
	if r := guestKernel(dir); r.Verdict != Warn || r.Remedy == "" {
		t.Errorf("without one: got %+v", r)
	}
	if err := os.MkdirAll(filepath.Join(dir, "kernels", "6.1"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("6.1", filepath.Join(dir, "kernels", "current")); err != nil {
		t.Fatal(err)
	}
	if r := guestKernel(dir); r.Verdict != OK || r.Detail != "6.1" {
		t.Errorf("with one: got %+v", r)
	}
}

func TestReflinksAreTriedWhereTheDataDirectoryWillBe(t *testing.T) {
	dir := t.TempDir()
	there, missing := reflinks(dir), reflinks(filepath.Join(dir, "not", "yet"))
	if there != missing {
		t.Errorf("got %+v, and where the directory is not yet %+v", there, missing)
	}
	if there.Verdict == Fail {
		t.Errorf("got %+v: nobody but virtual machines needs them", there)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left %v (%v)", left, err)
	}
}

func TestAFileThatMayOutgrowItsDiskIsWarnedOf(t *testing.T) {
	dir := t.TempDir()
	if r := diskFile(dir); r.Verdict != OK {
		t.Errorf("without one: got %+v", r)
	}
	var host unix.Statfs_t
	if err := unix.Statfs(dir, &host); err != nil {
		t.Fatal(err)
	}
	free := int64(host.Bavail) * host.Bsize
	for size, want := range map[int64]Verdict{free / 2: OK, free * 2: Warn} {
		if err := os.WriteFile(filepath.Join(dir, "disks.xfs"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(filepath.Join(dir, "disks.xfs"), size); err != nil {
			t.Fatal(err)
		}
		if r := diskFile(dir); r.Verdict != want || (r.Remedy == "") != (want == OK) {
			t.Errorf("with one of %d bytes: got %+v", size, r)
		}
	}
}

func TestAPortInUseFailsUnlessThePlatformHasIt(t *testing.T) {
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if r := port(t.Context(), l.Addr().String(), false); r.Verdict != Fail {
		t.Errorf("port in use: got %+v", r)
	}
	if r := port(t.Context(), l.Addr().String(), true); r.Verdict != OK {
		t.Errorf("port of the running platform: got %+v", r)
	}
}

func TestTheRuntimesWordsReachTheUser(t *testing.T) {
	probe := func(context.Context) error { return errors.New("no platform works") }
	if r := runtimeProbe(t.Context(), probe); r.Verdict != Fail || r.Detail != "no platform works" {
		t.Errorf("got %+v", r)
	}
}

func TestWorstIsTheWorst(t *testing.T) {
	for _, tt := range []struct {
		in   []Verdict
		want Verdict
	}{
		{nil, OK}, {[]Verdict{OK, Warn, OK}, Warn}, {[]Verdict{Warn, Fail, OK}, Fail}, {[]Verdict{OK, OK}, OK},
	} {
		var results []Result
		for _, v := range tt.in {
			results = append(results, Result{Verdict: v})
		}
		if got := Worst(results); got != tt.want {
			t.Errorf("Worst(%v) = %s, want %s", tt.in, got, tt.want)
		}
	}
}

func TestADataDirectoryThatIsNotThereYetIsJudgedByItsParent(t *testing.T) {
	if r := disk(filepath.Join(t.TempDir(), "a", "b")); r.Verdict == Fail {
		t.Errorf("got %+v", r)
	}
}
