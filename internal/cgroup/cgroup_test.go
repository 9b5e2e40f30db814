package cgroup

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// The host that runs the tests has one version of cgroups; the files of the
// other are laid out here as its kernel would.
func TestFiguresAreReadFromBothVersionsOfCgroups(t *testing.T) {
	const group = "/wrenn-7e57/box"
	for name, test := range map[string]struct {
		v2    bool
		files map[string]string
	}{
		"version 1": {files: map[string]string{
			"cpuacct/cpuacct.usage":        "1500000000\n",
			"memory/memory.usage_in_bytes": "5000\n",
			"memory/memory.stat":           "cache 1\ninactive_file 7\ntotal_inactive_file 1000\ntotal_active_file 500\n",
			"memory/memory.oom_control":    "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
			"memory/memory.limit_in_bytes": "",
			"pids/pids.current":            "12\n",
		}},
		"version 2": {v2: true, files: map[string]string{
			"cpu.stat":         "usage_usec 1500000\nuser_usec 1\n",
			"memory.current":   "5000\n",
			"memory.stat":      "anon 1\ninactive_file 1000\nactive_file 500\n",
			"memory.events":    "low 0\noom 1\noom_kill 1\noom_group_kill 1\n",
			"memory.max":       "",
			"memory.swap.max":  "",
			"memory.oom.group": "",
			"pids.current":     "12\n",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			hs := Trees{{path: root, v2: true}}
			if !test.v2 {
				hs = nil
				for _, c := range []string{"cpuacct", "memory", "pids"} {
					hs = append(hs, hierarchy{path: filepath.Join(root, c), controllers: []string{c}})
				}
			}
			for name, content := range test.files {
				path := filepath.Join(root, filepath.Dir(name), group, filepath.Base(name))
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if cpu, err := hs.CPUTime(group); err != nil || cpu != 1500*time.Millisecond {
				t.Errorf("cpu %v, %v", cpu, err)
			}
			if memory, err := hs.Memory(group); err != nil || memory != 3500 {
				t.Errorf("memory %v, %v", memory, err)
			}
			if pids, err := hs.PIDs(group); err != nil || pids != 12 {
				t.Errorf("pids %v, %v", pids, err)
			}
			if !hs.OutOfMemory(group) {
				t.Error("out of memory not seen")
			}
			if err := hs.LimitMemory(group, 4096); err != nil {
				t.Error(err)
			}
			limit, _ := hs.file(group, "memory", "memory.limit_in_bytes", "memory.max")
			if n, err := readNumber(limit); err != nil || n != 4096 {
				t.Errorf("limit %v, %v", n, err)
			}
			if got := hs.Children(filepath.Dir(group)); len(got) != 1 || got[0] != "box" {
				t.Errorf("children %v", got)
			}
		})
	}
}
