package cgroup

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

func TestTheWritableMountOfVersion2IsFound(t *testing.T) {
	for _, tc := range []struct{ name, mounts, want string }{
		{"among others", "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\nx /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n", "/sys/fs/cgroup/unified"},
		{"one that may only be read", "x /a cgroup2 ro,relatime 0 0\nx /b cgroup2 rw 0 0\n", "/b"},
		{"options that only begin like it", "x /a cgroup2 rwx 0 0\n", ""},
		{"lines that are none", "\nx\nx /a cgroup2\n", ""},
		{"a name that says so", "cgroup2 /a tmpfs rw 0 0\n", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := mountOf(tc.mounts)
			if got != tc.want || (tc.want == "") != errors.Is(err, ErrNone) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

// A directory stands in for a hierarchy with controllers, which not every machine
// has: this shows what is written, not what the kernel makes of it.
func TestLimitsAreSetForTheControllersThatThereAre(t *testing.T) {
	root := t.TempDir()
	files := map[string]string{
		"cgroup.controllers": "cpuset cpu io pids hugetlb\n", "cgroup.subtree_control": "",
		"agent/cgroup.procs": "", "agent/cpu.weight": "100", "agent/memory.min": "0", "user/pids.max": "max",
	}
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if err := limit(root); err != nil {
		t.Fatal(err)
	}
	read := func(name string) string {
		data, _ := os.ReadFile(filepath.Join(root, name))
		return string(data)
	}
	if read("agent/cgroup.procs") != strconv.Itoa(os.Getpid()) || read("agent/cpu.weight") != "10000" {
		t.Errorf("agent: procs %q, weight %q", read("agent/cgroup.procs"), read("agent/cpu.weight"))
	}
	if most, err := strconv.Atoi(read("user/pids.max")); err != nil || most < 1000 || most >= 1<<15 {
		t.Errorf("pids.max is %q", read("user/pids.max"))
	}
	if read("agent/memory.min") != "0" {
		t.Error("memory was set without its controller")
	}
}

func TestADirectoryThatIsNoHierarchyIsRefused(t *testing.T) {
	if _, err := New(filepath.Join(t.TempDir(), "none")); !errors.Is(err, ErrNone) {
		t.Errorf("got %v", err)
	}
	if _, err := New(t.TempDir()); err == nil {
		t.Error("a plain directory was taken for a hierarchy")
	}
}
