package gvisor_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/gvisor"
	"github.com/wrenn/wrenn/internal/runtime/runtimetest"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// engine is the path of the runsc that the tests execute.
var engine string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "wrenn-runsc-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	engine = filepath.Join(dir, "runsc")
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", engine, "./runsc/testdata/runsc")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build runsc: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

const tag = "7e57"

func TestConformance(t *testing.T) {
	requireRoot(t)
	runtimetest.Run(t, func(t *testing.T) runtimetest.Harness { return harness(t, filepath.Join(t.TempDir(), "runsc")) })
}

// A socket's path has room for 107 bytes; a data directory may be longer.
func TestALongDataDirectoryWorks(t *testing.T) {
	requireRoot(t)
	root := filepath.Join(t.TempDir(), strings.Repeat("long/", 40), "runsc")
	runtimetest.RunFew(t, harness(t, root))
}

// Commas and colons are what runsc parts lists by.
func TestADataDirectoryOfAnyNameWorks(t *testing.T) {
	requireRoot(t)
	dir := filepath.Join(t.TempDir(), "a, b:c%d%COMMAND% é=")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", dir)
	binary, err := os.ReadFile(engine)
	if err != nil {
		t.Fatal(err)
	}
	named := filepath.Join(dir, "runsc-binary")
	if err := os.WriteFile(named, binary, 0o755); err != nil {
		t.Fatal(err)
	}
	defer func(was string) { engine = was }(engine)
	engine = named
	// With temporary directories of its own, which are below that one.
	t.Run("below", func(t *testing.T) { runtimetest.RunFew(t, harness(t, filepath.Join(t.TempDir(), "runsc"))) })
}

func requireRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: gVisor is started with namespaces and cgroups")
	}
}

func open(t *testing.T, binary, root string) *gvisor.Runtime {
	rt, err := gvisor.New(gvisor.Config{Binary: binary, Root: root, Tag: tag, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	return rt
}

func harness(t *testing.T, root string) runtimetest.Harness {
	t.Cleanup(func() {
		if err := gvisor.RemoveAll(root, tag); err != nil {
			t.Error(err)
		}
		for _, left := range leftovers(t, root, "wrenn-"+tag) {
			t.Error("left after RemoveAll:", left)
		}
		if entries, _ := os.ReadDir(root); len(entries) > 0 {
			t.Error("left in runsc's root after RemoveAll:", entries)
		}
	})
	slot := runtimetest.Slots(t, network.Config{
		Tag: tag, CIDR: netip.MustParsePrefix("10.233.0.0/24"), Log: slog.New(slog.DiscardHandler),
	})
	return runtimetest.Harness{
		Runtime: open(t, engine, root),
		Reopen:  func(t *testing.T) runtime.Runtime { return open(t, engine, root) },
		Slot:    slot,
		Outside: func(t *testing.T) netip.AddrPort { return runtimetest.Outside(t, tag) },
		KillEngine: func(t *testing.T, inst runtime.Instance) {
			var state struct{ Engine struct{ PID int } }
			if err := json.Unmarshal(inst.State(), &state); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(state.Engine.PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		},
		BeginPause: func(t *testing.T, inst runtime.Instance) {
			var state struct{ Dir string }
			if err := json.Unmarshal(inst.State(), &state); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(state.Dir, "paused"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		Corrupt: func(t *testing.T, image runtime.Image) {
			name := map[runtime.ImageKind]string{runtime.ImageMemory: "checkpoint.img", runtime.ImageFiles: "multitar.img"}[image.Kind]
			f, err := os.OpenFile(filepath.Join(image.Dir, name), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			size, err := f.Seek(0, io.SeekEnd)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(bytes.Repeat([]byte{0xa5}, int(size/2)), size/4); err != nil {
				t.Fatal(err)
			}
		},
		Leftovers: func(t *testing.T, id sandbox.ID) []string { return leftovers(t, root, string(id)) },
	}
}

// leftovers are what is on the host that has name in it.
func leftovers(t *testing.T, root, name string) []string {
	sockets, _ := filepath.Glob(fmt.Sprintf("/run/*%s*", name))
	return append(runtimetest.Leftovers(t, name, root), sockets...)
}

func TestProbeRunsAGuestInUnderASecondAndLeavesNothing(t *testing.T) {
	requireRoot(t)
	root := filepath.Join(t.TempDir(), "runsc")
	rt := open(t, engine, root)
	start := time.Now()
	if err := rt.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Log("probe took", time.Since(start))
	if d := time.Since(start); d > 3*time.Second { // loaded machines included
		t.Errorf("probe took %v", d)
	}
	if err := rt.Close(); err != nil {
		t.Fatal(err)
	}
	for _, left := range leftovers(t, root, "wrenn-"+tag) {
		t.Error("left:", left)
	}
	if entries, _ := os.ReadDir(root); len(entries) > 0 {
		t.Error("left in runsc's root:", entries)
	}
}

func TestProbeSaysWhyItFails(t *testing.T) {
	requireRoot(t)
	rt := open(t, "/bin/false", filepath.Join(t.TempDir(), "runsc"))
	if err := rt.Probe(t.Context()); err == nil {
		t.Fatal("a probe with a program that is not runsc succeeded")
	} else if !strings.Contains(err.Error(), "gvisor does not run here") {
		t.Errorf("got %q", err)
	}
}

func TestVersionIsThatOfTheEngineInTheBinary(t *testing.T) {
	rt, err := gvisor.New(gvisor.Config{Binary: engine, Root: t.TempDir(), Tag: tag})
	if err != nil {
		t.Fatal(err)
	}
	if v := rt.Version(); !strings.HasPrefix(v, "v0.0.0-20") {
		t.Errorf("version %q", v)
	}
}
