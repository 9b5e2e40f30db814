package e2e

import (
	"bytes"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/nftables"
)

// leftovers lists what is on this host of the platform with data directory dir:
// processes, network namespaces, links, nftables tables, mounts, cgroups and
// sandboxes' and instances' directories. After an end with nothing left running it
// has to be empty.
func leftovers(t testing.TB, dir string) []string {
	t.Helper()
	tag := tag(dir)
	left := processesOf(t, dir, "wrenn-"+tag)
	left = append(left, matches("network namespace", "/run/netns/wrenn-"+tag+"-*")...)
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Name, "w"+tag+"-") {
			left = append(left, "link "+l.Name)
		}
	}
	tables, err := (&nftables.Conn{}).ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		if table.Name == "wrenn_"+tag {
			left = append(left, "nftables table "+table.Name)
		}
	}
	left = append(left, mountsOf(t, dir)...)
	left = append(left, cgroupsNamed(t, "wrenn-"+tag)...)
	for _, path := range matches("directory", filepath.Join(dir, "agent", "sandboxes", "*")) {
		if _, err := os.Stat(filepath.Join(strings.TrimPrefix(path, "directory "), "image")); err != nil { // one that is paused stays
			left = append(left, path)
		}
	}
	return append(left, matches("directory", filepath.Join(dir, "agent", "instances", "*"))...)
}

// leftoversOf lists what is on this host of one sandbox, while its platform and
// other sandboxes may run.
func leftoversOf(t testing.TB, b *box) (left []string) {
	t.Helper()
	if b.instance != "" {
		left = processesOf(t, b.instance, b.instance)
		left = append(left, mountsOf(t, b.instance)...)
		left = append(left, cgroupsNamed(t, b.instance)...)
		left = append(left, matches("directory", filepath.Join(b.p.dir, "agent", "instances", b.instance))...)
	}
	return append(left, matches("directory", filepath.Join(b.p.dir, "agent", "sandboxes", b.id))...)
}

// namespacesOf counts the network namespaces of a platform: two for each slot.
func namespacesOf(dir string) int {
	return len(matches("", "/run/netns/wrenn-"+tag(dir)+"-*"))
}

// processesOf lists processes whose arguments name text or that are in a cgroup
// whose path has the given name.
func processesOf(t testing.TB, text, cgroup string) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		// A process may end at any time; then its files cannot be read.
		args, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		groups, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cgroup"))
		// One that has ended holds nothing, and goes when its parent has looked.
		if status, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "status")); bytes.Contains(status, []byte("\nState:\tZ")) {
			continue
		}
		if bytes.Contains(args, []byte(text)) || bytes.Contains(groups, []byte(cgroup)) {
			found = append(found, fmt.Sprintf("process %d: %s", pid, bytes.ReplaceAll(args, []byte{0}, []byte{' '})))
		}
	}
	return found
}

func mountsOf(t testing.TB, text string) []string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, text) {
			found = append(found, "mount "+strings.TrimSpace(line))
		}
	}
	return found
}

func cgroupsNamed(t testing.TB, name string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil // a group may go at any time
		}
		if d.Name() == name {
			found = append(found, "cgroup "+path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func matches(what, pattern string) []string {
	paths, _ := filepath.Glob(pattern) // fails only for a bad pattern
	for i, path := range paths {
		paths[i] = what + " " + path
	}
	return paths
}

// lockedBuffer is written by one goroutine and read by others.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
