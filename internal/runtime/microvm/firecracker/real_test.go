package firecracker_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/memory"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker"
)

// newRealSite skips where no Firecracker is named or it cannot have KVM.
func newRealSite(t *testing.T) *site {
	t.Helper()
	binary := os.Getenv("FIRECRACKER_BIN")
	if binary == "" {
		t.Skip("FIRECRACKER_BIN names no Firecracker")
	}
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skip("KVM does not open: ", err)
	}
	kvm.Close()
	s := newSite(t)
	s.real = binary
	return s
}

// eachRealJail runs a test with our own jail, and with Firecracker's jailer where
// there is one.
func eachRealJail(t *testing.T, f func(t *testing.T, s *site)) {
	s := newRealSite(t)
	for _, jailer := range []bool{false, true} {
		t.Run(map[bool]string{false: "own jail", true: "jailer"}[jailer], func(t *testing.T) {
			s.jailer = jailer
			if says := s.monitor(t, "", firecracker.Config{}).Confinement(); jailer && !strings.HasPrefix(says, "Firecracker's jailer") {
				t.Skip("machines are confined by ", says)
			}
			f(t, s)
		})
	}
}

// realMachine is one with the guest of a few instructions.
func (s *site) realMachine(t *testing.T) microvm.Machine {
	m := s.machine(t)
	m.Kernel = guestKernel(t)
	return m
}

func allMemory(t *testing.T, dir string) []byte {
	t.Helper()
	image, err := memory.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	all := make([]byte, memoryMiB<<20)
	if _, err := image.ReadAt(all, 0); err != nil {
		t.Fatal(err)
	}
	return all
}

func pagesThatDiffer(a, b []byte) []int {
	var pages []int
	for at := 0; at < len(a); at += 4096 {
		if !bytes.Equal(a[at:at+4096], b[at:at+4096]) {
			pages = append(pages, at/4096)
		}
	}
	return pages
}

// counted gives what the guest has counted to, in an image.
func counted(t *testing.T, dir string) uint64 {
	t.Helper()
	return binary.LittleEndian.Uint64(allMemory(t, dir)[guestCounter:])
}

// saveLater saves a machine whose guest has counted further than n, and says how far.
func saveLater(t *testing.T, f *firecracker.Monitor, m microvm.Machine, n uint64) (dir string, counts uint64) {
	t.Helper()
	for until := time.Now().Add(10 * time.Second); time.Now().Before(until); {
		call(t, m, f.Resume)
		dir = save(t, f, m)
		if counts = counted(t, dir); counts > n {
			return dir, counts
		}
	}
	t.Fatalf("the guest has counted to %d and no further", counts)
	return "", 0
}

// wantWhole compares an image that was put together of layers, the last of which has
// what Firecracker says was written, with all the memory of the paused machine.
func wantWhole(t *testing.T, m microvm.Machine, dir string) {
	t.Helper()
	c := firecracker.NewClient(filepath.Join(m.Run(), "api.sock"))
	defer c.Close()
	s := firecracker.SnapshotCreate{Kind: firecracker.Full, State: "/run/wrenn/whole.state", Memory: "/run/wrenn/whole.memory"}
	if err := c.CreateSnapshot(t.Context(), s, m.MemoryMiB); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(filepath.Join(m.Run(), "whole.memory"))
	if err != nil {
		t.Fatal(err)
	}
	if different := pagesThatDiffer(whole, allMemory(t, dir)); len(different) > 0 {
		t.Errorf("the pages %#x of the image are not the machine's", different)
	}
}

// The whole life of a machine in the real Firecracker, and in the real jailer.
func TestReal(t *testing.T) { eachRealJail(t, testReal) }

func testReal(t *testing.T, s *site) {
	for _, source := range []string{"from a file", "from the pager"} {
		t.Run(source, func(t *testing.T) {
			cfg := firecracker.Config{}
			if source == "from the pager" {
				_, socket := startPager(t)
				cfg = throughPager(socket)
			}
			f, m := s.monitor(t, "", cfg), s.realMachine(t)
			id, err := f.Boot(t.Context(), m)
			if err != nil {
				t.Fatal(err)
			}
			s.wantConfined(t, id, m)
			image, n := saveLater(t, f, m, 0)
			if said := microvm.LastWords(m); !strings.Contains(said, "hi") {
				t.Errorf("the guest has counted to %d, and said %q", n, said)
			}
			saveLater(t, f, m, n)

			m = s.machine(t)
			if id, err = f.Load(t.Context(), m, image); err != nil {
				t.Fatal(err)
			}
			s.wantConfined(t, id, m)
			before, after := allMemory(t, image), allMemory(t, save(t, f, m))
			// Below the guest are the id of its generation and its clock, which are new.
			if different := pagesThatDiffer(before, after); len(different) > 2 || slices.ContainsFunc(different, func(p int) bool { return p >= guestAt/4096 }) {
				t.Errorf("the pages %#x are not as they were", different)
			}
			for range 3 {
				f := s.monitor(t, "", cfg)
				var dir string
				dir, n = saveLater(t, f, m, n)
				wantWhole(t, m, dir)
			}
			wantIdentity(t, f, m)
		})
	}
}

// Every call of the client on the real Firecracker.
func TestRealCalls(t *testing.T) {
	s := newRealSite(t)
	netns, ctx := s.slot(t).InnerNetNS, t.Context()
	open := func() *vmm {
		v := launch(t, s.real, func(cmd *exec.Cmd) error {
			inNamespace(t, netns, cmd.Start)
			return nil
		})
		for { // until it listens
			line, err := v.output.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(line, "API server started") {
				break
			}
		}
		v.ask(t)
		return v
	}
	v := open()
	v.wantState(t, firecracker.NotStarted)
	if v.can.SerialPath {
		if err := v.SetSerial(ctx, firecracker.Serial{Path: file(t)}); err != nil {
			t.Error(err)
		}
	}
	if err := v.SetCPU(ctx, v.can, processors); err != nil {
		t.Error(err)
	}
	if err := v.SetCPU(ctx, v.can, firecracker.CPUConfig{}); err != nil { // the one before is not for every processor
		t.Error(err)
	}
	v.bootKernel(t, guestKernel(t))
	v.wantState(t, firecracker.Running)
	if all, err := v.Config(ctx); err != nil || !strings.Contains(string(all), `"vcpu_count":2`) {
		t.Errorf("all that is configured: %s (%v)", all, err)
	}
	if m, err := v.Machine(ctx); err != nil || m.CPUs != 2 || m.MemoryMiB != memoryMiB {
		t.Errorf("machine is %+v (%v)", m, err)
	}
	var data map[string]string
	if err := v.MMDS(ctx, &data); err != nil || data["instanceID"] != "box" {
		t.Errorf("metadata is %v (%v)", data, err)
	}
	if stats, err := v.BalloonStats(ctx); err != nil || stats.TargetMiB != 0 {
		t.Errorf("the balloon is %+v (%v)", stats, err)
	}
	if v.can.BalloonHinting {
		if h, err := v.Hinting(ctx, v.can); err != nil || h.Host != firecracker.HintingStop || h.Guest != nil {
			t.Errorf("hinting is %+v (%v)", h, err)
		}
		// The guest has no driver for it.
		wantError(t, v.StartHinting(ctx, v.can, true), "PATCH", "/balloon/hinting/start", "not activated")
		wantError(t, v.StopHinting(ctx, v.can), "PATCH", "/balloon/hinting/stop", "not activated")
	}
	wantError(t, v.UpdateBalloon(ctx, firecracker.BalloonUpdate{AmountMiB: 1}), "PATCH", "/balloon", "not activated")
	first := v.snapshot(t, firecracker.Full)
	v.wantState(t, firecracker.Paused)
	for range 2 {
		if err := v.Resume(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.CtrlAltDel(ctx); err != nil {
		t.Error(err)
	}
	if err := v.cmd.Process.Kill(); err != nil { // the guest does not listen to it
		t.Fatal(err)
	}
	_ = v.cmd.Wait() // was killed

	v = open()
	load := firecracker.SnapshotLoad{
		State: first.State, Memory: firecracker.MemoryBackend{Kind: firecracker.File, Path: first.Memory}, TrackDirty: true,
		Networks: []firecracker.NetworkOverride{{ID: "eth0", TAP: "tap0"}}, ClockRealtime: v.can.ClockRealtime,
	}
	if v.can.VsockOverride {
		load.Vsock = &firecracker.VsockOverride{Path: filepath.Join(t.TempDir(), "vsock")}
	}
	if err := v.Load(ctx, v.can, load, memoryMiB); err != nil {
		t.Fatal(err)
	}
	v.wantState(t, firecracker.Paused)
	v.snapshot(t, firecracker.Diff)
	v.wantState(t, firecracker.Paused)
}
