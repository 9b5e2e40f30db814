package firecracker_test

import (
	"encoding/binary"
	"os"
	"path/filepath"
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

// counted gives what the guest has counted to, in an image.
func counted(t *testing.T, dir string) uint64 {
	t.Helper()
	image, err := memory.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	page := make([]byte, 4096)
	if _, err := image.ReadAt(page, guestCounter); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(page)
}

// saveLater lets the guest count on before it is saved.
func saveLater(t *testing.T, f *firecracker.Monitor, m microvm.Machine) string {
	t.Helper()
	time.Sleep(50 * time.Millisecond)
	return save(t, f, m)
}

// The whole life of a machine in the real Firecracker, and in the real jailer.
func TestReal(t *testing.T) { eachRealJail(t, testReal) }

func testReal(t *testing.T, s *site) {
	for _, memory := range []string{"from a file", "from the pager"} {
		t.Run(memory, func(t *testing.T) {
			cfg := firecracker.Config{}
			if memory == "from the pager" {
				cfg.Pager = always(startPager(t))
			}
			f, m := s.monitor(t, "", cfg), s.realMachine(t)
			id, err := f.Boot(t.Context(), m)
			if err != nil {
				t.Fatal(err)
			}
			s.wantConfined(t, id, m)
			image := saveLater(t, f, m)
			n := counted(t, image)
			if said := microvm.LastWords(m); n == 0 || !strings.Contains(said, "hi") {
				t.Fatalf("the guest has counted to %d, and said %q", n, said)
			}
			call(t, m, f.Resume)
			if again := counted(t, saveLater(t, f, m)); again <= n {
				t.Errorf("it has counted to %d and then to %d", n, again)
			}

			m = s.machine(t)
			if id, err = f.Load(t.Context(), m, image); err != nil {
				t.Fatal(err)
			}
			s.wantConfined(t, id, m)
			for layers := 2; layers < 5; layers++ {
				f := s.monitor(t, "", cfg)
				call(t, m, f.Resume)
				dir := saveLater(t, f, m)
				next := counted(t, dir)
				if next <= n {
					t.Errorf("it has counted to %d and then to %d", n, next)
				}
				n = next
			}
			var data map[string]string
			c := firecracker.NewClient(filepath.Join(m.Run(), "api.sock"))
			defer c.Close()
			if err := c.MMDS(t.Context(), &data); err != nil || data["instanceID"] != string(m.ID) {
				t.Errorf("metadata is %v (%v)", data, err)
			}
		})
	}
}
