package kernel

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// testKernel returns the distribution's kernel, which is downloaded once for all
// runs of the tests.
func testKernel(t *testing.T) Kernel {
	t.Helper()
	dir := os.Getenv("WRENN_TEST_DATA")
	if dir == "" {
		dir = "/var/tmp/wrenn-test"
	}
	dir = filepath.Join(dir, "kernels")
	k, err := Load(dir)
	if errors.Is(err, sandbox.ErrNotFound) {
		if os.Geteuid() != 0 {
			t.Skip("needs root: installs a kernel for the tests")
		}
		k, err = Install(t.Context(), dir, Options{})
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// report is what the stand-in for the guest agent says of its machine.
type report struct {
	PID     int
	Args    []string
	Mounts  string
	Modules string
	Release string
	MiB     int
	Write   string
	Root    []string
	Links   []string
}

func TestAMachineBootsIntoItsAgent(t *testing.T) {
	k := testKernel(t)
	for _, image := range []string{k.Vmlinux, k.Vmlinuz} {
		t.Run(filepath.Base(image), func(t *testing.T) {
			if image == "" || image == k.Vmlinux && !k.PVH {
				t.Skip("QEMU cannot boot it")
			}
			testBoot(t, k, image)
		})
	}
}

func testBoot(t *testing.T, k Kernel, image string) {
	root, agent := makeDisks(t)
	start := time.Now()
	said := runMachine(t, k, image, root, agent, "-x", "y z")
	t.Logf("from start to end of the machine: %v", time.Since(start).Round(10*time.Millisecond))
	_, line, ok := strings.Cut(said, "\nREPORT ")
	if !ok {
		t.Fatalf("the agent did not report; the console has:\n%s", said)
	}
	line, _, _ = strings.Cut(line, "\n")
	var r report
	if err := json.Unmarshal([]byte(line), &r); err != nil {
		t.Fatalf("%v in %q", err, line)
	}
	if r.PID != 1 || !slices.Equal(r.Args, []string{"-vm", "-x", "y", "z"}) {
		t.Errorf("the agent is process %d with arguments %q", r.PID, r.Args)
	}
	if r.Release != k.Version {
		t.Errorf("the machine runs %q, want %q", r.Release, k.Version)
	}
	if r.MiB < 1950 || r.MiB > 2048 {
		t.Errorf("the root has %d MiB on a disk of 2048", r.MiB)
	}
	if r.Write != "<nil>" {
		t.Errorf("writing to the root: %s", r.Write)
	}
	// Of the initramfs nothing is left, and no name of the agent's disk.
	want := []string{"dev", "lost+found", "proc", "usr", "written"}
	if !slices.Equal(r.Root, want) {
		t.Errorf("the root has %v, want %v", r.Root, want)
	}
	for _, want := range []string{"/dev/vda / ext4 rw,noatime", "/dev/vdb /usr/bin/envd ext4 ro,", "devtmpfs /dev devtmpfs rw,"} {
		if !strings.Contains(r.Mounts, want) {
			t.Errorf("no %q among the mounts:\n%s", want, r.Mounts)
		}
	}
	if n := strings.Count(r.Mounts, "/dev/vdb"); n != 1 {
		t.Errorf("the agent's disk is mounted %d times:\n%s", n, r.Mounts)
	}
	for _, want := range []string{"virtio_net", "tcp_diag", "virtio_rng"} {
		if !strings.Contains(r.Modules, want+" ") {
			t.Errorf("module %s is not loaded", want)
		}
	}
	if !slices.Contains(r.Links, "eth0") {
		t.Errorf("the machine has the links %v, want eth0", r.Links)
	}
	if before, _, _ := strings.Cut(said, "\nREPORT "); strings.Contains(before, "[    ") {
		t.Errorf("the kernel talks:\n%s", before)
	}
}

func TestAMachineThatCannotBootSaysWhyAndEnds(t *testing.T) {
	k := testKernel(t)
	_, agent := makeDisks(t)
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	said := runMachine(t, k, k.Vmlinux, empty, agent)
	if want := "guestboot: the machine cannot start: mount /dev/vda:"; !strings.Contains(said, want) {
		t.Errorf("the console has no %q:\n%s", want, said)
	}
}

// makeDisks makes a root disk that has grown since it was made, and the agent's.
func makeDisks(t *testing.T) (root, agent string) {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"root/proc", "root/dev", "root/usr/bin", "agent"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "agent", "envd"), "./testdata/agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the stand-in: %v: %s", err, out)
	}
	root, agent = filepath.Join(dir, "root.ext4"), filepath.Join(dir, "agent.ext4")
	for from, to := range map[string]string{"root": root, "agent": agent} {
		if err := disk.MakeExt4(t.Context(), filepath.Join(dir, from), to); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Truncate(root, 2<<30); err != nil {
		t.Fatal(err)
	}
	return root, agent
}

// runMachine runs a machine until it ends and returns what its console had.
func runMachine(t *testing.T, k Kernel, image, root, agent string, words ...string) string {
	t.Helper()
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is not installed")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	line := append(Args(), append([]string{"--"}, words...)...)
	cmd := exec.CommandContext(ctx, qemu,
		"-M", "q35", "-accel", "tcg,tb-size=64", "-cpu", "max", "-m", "256",
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-kernel", image, "-initrd", k.Initramfs, "-append", strings.Join(line, " "),
		"-drive", "file="+root+",if=none,id=root,format=raw", "-device", "virtio-blk-pci,drive=root",
		"-drive", "file="+agent+",if=none,id=agent,format=raw,readonly=on", "-device", "virtio-blk-pci,drive=agent",
		"-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,romfile=",
		"-device", "virtio-rng-pci",
	)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		t.Fatalf("qemu: %v; the console has:\n%s", err, &said)
	}
	return strings.ReplaceAll(said.String(), "\r\n", "\n")
}
