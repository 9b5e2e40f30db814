package firecracker_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/cgroup"
	"github.com/wrenn/wrenn/internal/memory"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/process"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker"
	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker/fake"
	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
	"github.com/wrenn/wrenn/internal/sandbox"
)

const tag = "7e5f"

// site is what machines of a test are made in.
type site struct {
	pool    *network.Pool
	cgroups cgroup.Trees
	binary  string // of the fake, without a version
	jailer  bool   // machines are confined by Firecracker's jailer, or by the fake of it
	real    string // the Firecracker that is used in the place of the fake
	n       int
}

func newSite(t *testing.T) *site {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("monitors are started with namespaces and cgroups, which needs root")
	}
	s := &site{binary: filepath.Join(t.TempDir(), "fake")}
	build := exec.Command("go", "build", "-o", s.binary, "./fake/program")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // the jail has no libraries
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var err error
	if s.cgroups, err = cgroup.Find(); err != nil {
		t.Fatal(err)
	}
	s.pool, err = network.Open(t.Context(), network.Config{
		Tag: tag, TAP: true, CIDR: netip.MustParsePrefix("10.235.0.0/24"), Log: slog.New(slog.DiscardHandler),
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.pool.Close(context.Background())
		network.RemoveAll(context.Background(), tag)
		if err := microvm.RemoveAll(tag); err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s *site) monitor(t *testing.T, version string, cfg firecracker.Config) *firecracker.Monitor {
	t.Helper()
	cfg.Data = t.TempDir()
	if s.real != "" {
		cfg.Binary = s.real
	} else {
		cfg.Binary = filepath.Join(cfg.Data, fake.Prefix+version)
		if err := os.Link(s.binary, cfg.Binary); err != nil {
			t.Fatal(err)
		}
	}
	if s.jailer && s.real != "" {
		cfg.Jailer = os.Getenv("WRENN_JAILER")
	} else if s.jailer {
		if err := os.Link(s.binary, filepath.Join(cfg.Data, fake.JailerPrefix+version)); err != nil {
			t.Fatal(err)
		}
	} else if cfg.Jailer == "" {
		cfg.Jailer = firecracker.NoJailer
	}
	m, err := firecracker.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// eachJail runs a test with our own jail and with Firecracker's jailer.
func eachJail(t *testing.T, f func(t *testing.T, s *site)) {
	s := newSite(t)
	for _, jailer := range []bool{false, true} {
		t.Run(map[bool]string{false: "own jail", true: "jailer"}[jailer], func(t *testing.T) {
			s.jailer = jailer
			f(t, s)
		})
	}
}

// machine makes the directory, slot and cgroup of one.
func (s *site) machine(t *testing.T) microvm.Machine {
	t.Helper()
	slot := s.slot(t)
	s.n++
	m := microvm.Machine{
		ID: sandbox.ID(fmt.Sprintf("box%d", s.n)), Dir: t.TempDir(), UID: 1<<30 + 0x7e5f<<14 + uint32(s.n),
		Group: fmt.Sprintf("/wrenn-%s/box%d", tag, s.n), Cgroups: s.cgroups, NetNS: slot.InnerNetNS, TAP: "tap0", MAC: "02:fc:00:00:00:15",
		CPUs: 1, MemoryMiB: memoryMiB, Kernel: readable(t), Initramfs: readable(t), CmdLine: "quiet -- -vm", Agent: readable(t),
	}
	for _, dir := range []string{m.Run(), m.Jail()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(m.Disk(), make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(m.Console(), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{m.Run(), m.Disk(), m.Console()} {
		if err := os.Chown(path, int(m.UID), int(m.UID)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.cgroups.Create(m.Group, cgroup.Limits{MemoryBytes: 256 << 20, CPUs: 1, PIDs: 64}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(s.cgroups.Kill(context.Background(), m.Group), s.cgroups.Remove(context.Background(), m.Group)); err != nil {
			t.Error(err)
		}
	})
	return m
}

func call(t *testing.T, m microvm.Machine, f func(context.Context, microvm.Machine) error) {
	t.Helper()
	if err := f(t.Context(), m); err != nil {
		t.Fatal(err)
	}
}

// save pauses the machine and writes an image of it.
func save(t *testing.T, f *firecracker.Monitor, m microvm.Machine) string {
	t.Helper()
	dir := t.TempDir()
	call(t, m, f.Pause)
	if err := f.Save(t.Context(), m, dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// wantCount compares all that the guest has in its memory with what it has when it
// has counted to n.
func wantCount(t *testing.T, dir string, n, layers int) {
	t.Helper()
	image, err := memory.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	got, want := make([]byte, memoryMiB<<20), make([]byte, memoryMiB<<20)
	if _, err := image.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint64(want[fake.Counter*4096:], uint64(n))
	for i := range n {
		for j := range 4096 {
			want[(fake.First+i)*4096+j] = byte(i + 1)
		}
	}
	for p := range len(got) / 4096 {
		if string(got[p*4096:][:4096]) != string(want[p*4096:][:4096]) {
			t.Fatalf("page %d is %v…, want %v…", p, got[p*4096:][:8], want[p*4096:][:8])
		}
	}
	if got := len(image.Layers()); got != layers {
		t.Errorf("the image has %d layers, want %d", got, layers)
	}
}

// wantConfined looks at the monitor from outside.
func (s *site) wantConfined(t *testing.T, id process.ID, m microvm.Machine) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", id.PID)
	read := func(name string) string {
		data, err := os.ReadFile(proc + name)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	status := read("status")
	for _, want := range []string{
		fmt.Sprintf("Uid:\t%d\t%d\t%d\t%d\n", m.UID, m.UID, m.UID, m.UID), fmt.Sprintf("Gid:\t%d\t%d\t%d\t%d\n", m.UID, m.UID, m.UID, m.UID), "Groups:\t \n",
		"CapInh:\t0000000000000000\n", "CapPrm:\t0000000000000000\n", "CapEff:\t0000000000000000\n", "CapAmb:\t0000000000000000\n", "NoNewPrivs:\t1\n",
	} {
		if !strings.Contains(status, want) {
			t.Errorf("the monitor has not %q:\n%s", want, status)
		}
	}
	if !s.jailer && !strings.Contains(status, "CapBnd:\t0000000000000000\n") {
		t.Errorf("it could get capabilities:\n%s", status)
	}
	if pids := regexp.MustCompile(`NSpid:\t\d+\t1\n`); !pids.MatchString(status) {
		t.Errorf("it is not the first process of a namespace of its own:\n%s", status)
	}
	for _, line := range []string{fmt.Sprintf(`Max file size +%d +%[1]d`, m.MemoryMiB<<20), `Max open files +2048 +2048`} {
		if limits := read("limits"); !regexp.MustCompile(line).MatchString(limits) {
			t.Errorf("its limits are not %q:\n%s", line, limits)
		}
	}
	if mounts := read("mountinfo"); !regexp.MustCompile(`(?m)^\d+ \d+ \S+ \S+ / .* - tmpfs jail `).MatchString(mounts) {
		t.Errorf("its root directory is none that is made for it:\n%s", mounts)
	}
	root, err := os.ReadDir(proc + "root")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range root {
		if !slices.Contains([]string{"boot", "dev", "disk", "proc", "run", "tmp", "old", "usr", "lib", "lib64", "etc"}, e.Name()) && !strings.HasPrefix(e.Name(), "firecracker") {
			t.Errorf("it sees %s", e.Name())
		}
	}
	for _, ns := range []string{"mnt", "pid", "ipc", "uts", "net"} {
		its, err := os.Readlink(proc + "ns/" + ns)
		ours, oerr := os.Readlink("/proc/self/ns/" + ns)
		if err := errors.Join(err, oerr); err != nil || its == ours {
			t.Errorf("it is in our %s namespace (%v)", ns, err)
		}
	}
	if n, err := m.Cgroups.PIDs(m.Group); err != nil || n == 0 {
		t.Errorf("its cgroup has %d tasks (%v)", n, err)
	}
	if in, err := os.ReadDir(m.Jail()); err != nil || len(in) > 0 {
		t.Errorf("its jail is on the host: %v (%v)", in, err)
	}
}

func TestMonitor(t *testing.T) { eachJail(t, testMonitor) }

func testMonitor(t *testing.T, s *site) {
	for _, version := range []string{"1.12.1", "1.14.0", "1.16.1"} {
		t.Run(version, func(t *testing.T) {
			f, m := s.monitor(t, version, firecracker.Config{}), s.machine(t)
			id, err := f.Boot(t.Context(), m)
			if err != nil {
				t.Fatal(err)
			}
			s.wantConfined(t, id, m)
			first := save(t, f, m)
			wantCount(t, first, 1, 1)
			call(t, m, f.Resume)
			wantCount(t, save(t, f, m), 2, 1) // whole again: nothing noted what changed

			s.lives(t, f, version, first)
		})
	}
}

// lives loads a machine, and saves it several times, each by another agent's monitor.
func (s *site) lives(t *testing.T, f *firecracker.Monitor, version, image string) {
	m := s.machine(t)
	id, err := f.Load(t.Context(), m, image)
	if err != nil {
		t.Fatal(err)
	}
	s.wantConfined(t, id, m)
	for n := 2; n < 5; n++ {
		f := s.monitor(t, version, firecracker.Config{})
		call(t, m, f.Resume)
		dir := save(t, f, m)
		wantCount(t, dir, n, n)
	}
	wantCount(t, image, 1, 1)
	wantIdentity(t, f, m)
	// A save that failed half-way leaves nobody to know what has changed.
	call(t, m, f.Resume)
	if err := f.Save(t.Context(), m, t.TempDir()); err == nil {
		t.Fatal("a machine is saved while it runs")
	}
	wantCount(t, save(t, f, m), 5, 1)
}

// wantIdentity sees whose a machine is said to be: nobody's, until it is told.
func wantIdentity(t *testing.T, f *firecracker.Monitor, m microvm.Machine) {
	t.Helper()
	c := firecracker.NewClient(filepath.Join(m.Run(), "api.sock"))
	defer c.Close()
	for _, want := range []firecracker.Metadata{{}, {SandboxID: "one", TemplateID: "base"}, {SandboxID: "two", TemplateID: "other"}} {
		if want.SandboxID != "" {
			if err := f.Identify(t.Context(), m, want.SandboxID, want.TemplateID); err != nil {
				t.Fatal(err)
			}
		}
		var got firecracker.Metadata
		if err := c.MMDS(t.Context(), &got); err != nil || got != want {
			t.Errorf("metadata is %+v (%v), want %+v", got, err, want)
		}
	}
}

// needFaultsServed skips where programs without rights have no faults served.
func needFaultsServed(t *testing.T) {
	t.Helper()
	if _, err := os.Stat("/dev/userfaultfd"); err != nil {
		if all, err := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd"); err != nil || string(all) != "1\n" {
			t.Skip("page faults of the kernel are not served for programs without rights on this host")
		}
	}
}

func TestMonitorThroughPager(t *testing.T) { eachJail(t, testMonitorThroughPager) }

func testMonitorThroughPager(t *testing.T, s *site) {
	needFaultsServed(t)
	_, socket := startPager(t)
	f := s.monitor(t, "1.15.1", throughPager(socket))
	m := s.machine(t)
	if _, err := f.Boot(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	image := save(t, f, m)
	s.lives(t, f, "1.15.1", image)
}

func TestLoadDamaged(t *testing.T) { eachJail(t, testLoadDamaged) }

func TestRealLoadDamaged(t *testing.T) { eachRealJail(t, testLoadDamaged) }

func testLoadDamaged(t *testing.T, s *site) {
	f, m := s.monitor(t, "1.15.1", firecracker.Config{}), s.machine(t)
	if s.real != "" {
		m.Kernel = guestKernel(t)
	}
	if _, err := f.Boot(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"devices", memory.HeaderName} {
		for _, damage := range []func(string) error{
			os.Remove,
			func(path string) error { return os.WriteFile(path, []byte("not what it was"), 0o600) },
		} {
			image := save(t, f, m)
			if err := damage(filepath.Join(image, name)); err != nil {
				t.Fatal(err)
			}
			if _, err := f.Load(t.Context(), s.machine(t), image); !errors.Is(err, sandbox.ErrInvalid) {
				t.Errorf("with %s damaged: %v", name, err)
			}
		}
	}
}

// A Firecracker that was taken over puts the socket of another in the place of its own.
func TestSocketOfAnother(t *testing.T) {
	s := newSite(t)
	f := s.monitor(t, "1.15.1", firecracker.Config{})
	m, other := s.machine(t), s.machine(t)
	for _, m := range []microvm.Machine{m, other} {
		if _, err := f.Boot(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	call(t, m, f.Pause)
	socket := filepath.Join(m.Run(), "api.sock")
	if err := os.Remove(socket); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(other.Run(), "api.sock"), socket); err != nil {
		t.Fatal(err)
	}
	if err := f.Pause(t.Context(), m); err == nil || !strings.Contains(err.Error(), "not the machine's") {
		t.Errorf("pause of another's machine: %v", err)
	}
}

// A host without a guest that could boot: the verdict says so, and is kept.
func TestProbe(t *testing.T) {
	path := program(t, "1.15.1")
	f, err := firecracker.New(t.Context(), firecracker.Config{Binary: path, Data: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	k := kernel.Kernel{Name: "test", Vmlinux: file(t), Initramfs: file(t)}
	first := f.Probe(t.Context(), k)
	t.Log(first)
	if !errors.Is(first, sandbox.ErrUnavailable) {
		t.Fatalf("a fake boots Linux: %v", first)
	}
	if err := os.Remove(path); err != nil { // what is kept needs it no more
		t.Fatal(err)
	}
	if again := f.Probe(t.Context(), k); again == nil || again.Error() != first.Error() {
		t.Errorf("first %v, then %v", first, again)
	}
	k.Name = "other"
	if other := f.Probe(t.Context(), k); other == nil || strings.Contains(first.Error(), "fake") && other.Error() == first.Error() {
		t.Errorf("the verdict on one kernel is taken for another's: %v", other)
	}
}
