package firecracker_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/memory"
	"github.com/wrenn/wrenn/internal/memory/pager"
	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker"
	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker/fake"
	"github.com/wrenn/wrenn/internal/sandbox"
)

func TestMain(m *testing.M) {
	if fake.IsProgram() {
		os.Exit(fake.Main())
	}
	if socket := os.Getenv(pagerEnv); socket != "" {
		log := slog.New(slog.NewTextHandler(os.Stderr, nil))
		if err := pager.Serve(context.Background(), socket, log, func() { pager.PrintReady(os.Stdout) }); err != nil {
			log.Error("the pager ends", "err", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Getenv(bootVariable) != "" {
		os.Exit(bootAsAgent())
	}
	os.Setenv("GORACE", "atexit_sleep_ms=0") // else each fake takes a second to end
	os.Exit(m.Run())
}

// pagerEnv has the socket of a pager that this program is to be.
const pagerEnv = "WRENN_TEST_PAGER"

// versions are one of each that differs.
var versions = []string{"1.12.1", "1.13.0", "1.14.0", "1.15.1", "1.16.0", "1.16.1"}

func eachVersion(t *testing.T, f func(t *testing.T, version string)) {
	for _, v := range versions {
		t.Run(v, func(t *testing.T) { f(t, v) })
	}
}

// program makes the fake of a version.
func program(t *testing.T, version string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), fake.Prefix+version)
	if err := os.Symlink(self, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// vmm is a fake that runs.
type vmm struct {
	*firecracker.Client
	can    firecracker.Capabilities
	cmd    *exec.Cmd
	output *bufio.Reader
}

func start(t *testing.T, version string) *vmm {
	t.Helper()
	v := launch(t, program(t, version), (*exec.Cmd).Start)
	v.expect(t, "Running Firecracker v"+version)
	v.ask(t)
	return v
}

// launch starts a Firecracker, in a way that is given.
func launch(t *testing.T, binary string, start func(*exec.Cmd) error) *vmm {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "api.sock")
	cmd := exec.Command(binary, "--api-sock", socket, "--id", "box")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // may have ended
		_ = cmd.Wait()
	})
	v := &vmm{Client: firecracker.NewClient(socket), cmd: cmd, output: bufio.NewReader(out)}
	t.Cleanup(v.Close)
	return v
}

// ask asks what the version can do.
func (v *vmm) ask(t *testing.T) {
	t.Helper()
	running, err := v.Version(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if v.can, err = firecracker.CapabilitiesOf(running); err != nil {
		t.Fatal(err)
	}
}

func (v *vmm) expect(t *testing.T, words string) {
	t.Helper()
	line, err := v.output.ReadString('\n')
	if err != nil || strings.TrimSpace(line) != words {
		t.Fatalf("firecracker says %q (%v), want %q", line, err, words)
	}
}

func file(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const memoryMiB = 4

// boot configures all that a machine has, and starts it.
func (v *vmm) boot(t *testing.T) {
	t.Helper()
	v.bootKernel(t, file(t))
	v.expect(t, "guest counts 1")
}

func (v *vmm) bootKernel(t *testing.T, kernel string) {
	t.Helper()
	ctx, path := t.Context(), file(t)
	limit := &firecracker.RateLimiter{Bandwidth: &firecracker.TokenBucket{Size: 1 << 20, Burst: 1 << 19, Refill: 1000}}
	steps := []error{
		v.SetLogger(ctx, firecracker.Logger{Level: "Warning"}),
		v.SetMetrics(ctx, firecracker.Metrics{Path: path}),
		v.SetBootSource(ctx, firecracker.BootSource{Kernel: kernel, Initrd: path, Args: "quiet"}),
		v.SetDrive(ctx, firecracker.Drive{ID: "root", Path: path, Root: true}),
		v.SetDrive(ctx, firecracker.Drive{ID: "agent", Path: path, ReadOnly: true}),
		v.SetNetwork(ctx, firecracker.NetworkInterface{ID: "eth0", TAP: "tap0", MAC: "02:fc:00:00:00:15", TX: limit}),
		v.SetMachine(ctx, firecracker.MachineConfig{CPUs: 2, MemoryMiB: memoryMiB}),
		v.SetMMDSConfig(ctx, firecracker.MMDSConfig{Version: "V2", Interfaces: []string{"eth0"}}),
		v.SetMMDS(ctx, map[string]string{"instanceID": "box"}),
		v.SetEntropy(ctx, firecracker.Entropy{}),
		v.SetVsock(ctx, firecracker.Vsock{GuestCID: 3, Path: filepath.Join(t.TempDir(), "vsock")}),
		v.SetBalloon(ctx, firecracker.Balloon{DeflateOnOOM: true, StatsSeconds: 1, Hinting: v.can.BalloonHinting, Reporting: v.can.BalloonHinting}),
		v.Start(ctx),
		v.UpdateDrive(ctx, firecracker.DriveUpdate{ID: "root", Limiter: limit}),
		v.UpdateNetwork(ctx, firecracker.NetworkInterfaceUpdate{ID: "eth0", TX: limit}),
		v.FlushMetrics(ctx),
	}
	for i, err := range steps {
		if err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
	}
}

func (v *vmm) wantState(t *testing.T, want string) {
	t.Helper()
	i, err := v.Instance(t.Context())
	if err != nil || i.State != want || i.ID != "box" {
		t.Fatalf("instance is %+v (%v), want state %q", i, err, want)
	}
}

func wantError(t *testing.T, err error, method, path, words string) {
	t.Helper()
	var e *firecracker.Error
	if !errors.As(err, &e) || e.Method != method || e.Path != path || e.Status != http.StatusBadRequest || !strings.Contains(e.Message, words) {
		t.Fatalf("got error %v, want one of %s %s with %q", err, method, path, words)
	}
}

func TestBootPauseResume(t *testing.T) {
	eachVersion(t, func(t *testing.T, version string) {
		v, ctx := start(t, version), t.Context()
		v.wantState(t, firecracker.NotStarted)
		v.boot(t)
		v.wantState(t, firecracker.Running)
		for range 2 { // may be repeated
			if err := v.Pause(ctx); err != nil {
				t.Fatal(err)
			}
			v.wantState(t, firecracker.Paused)
		}
		for range 2 {
			if err := v.Resume(ctx); err != nil {
				t.Fatal(err)
			}
			v.wantState(t, firecracker.Running)
		}
		v.expect(t, "guest counts 2")
		m, err := v.Machine(ctx)
		if err != nil || m.CPUs != 2 || m.MemoryMiB != memoryMiB {
			t.Errorf("machine is %+v (%v)", m, err)
		}
		var data map[string]string
		if err := v.MMDS(ctx, &data); err != nil || data["instanceID"] != "box" {
			t.Errorf("metadata is %v (%v)", data, err)
		}
		if _, err := v.Config(ctx); err != nil {
			t.Error(err)
		}
		if err := v.UpdateBalloon(ctx, firecracker.BalloonUpdate{AmountMiB: 1}); err != nil {
			t.Error(err)
		}
		if stats, err := v.BalloonStats(ctx); err != nil || stats.ActualMiB != 1 {
			t.Errorf("the balloon is %+v (%v)", stats, err)
		}
		if err := v.CtrlAltDel(ctx); err != nil {
			t.Error(err)
		}
		if err := v.cmd.Wait(); err != nil {
			t.Errorf("firecracker ends with %v", err)
		}
	})
}

func TestOrderOfCalls(t *testing.T) {
	eachVersion(t, func(t *testing.T, version string) {
		v, ctx := start(t, version), t.Context()
		dir := t.TempDir()
		snapshot := firecracker.SnapshotCreate{Kind: firecracker.Full, State: filepath.Join(dir, "state"), Memory: filepath.Join(dir, "memory")}
		wantError(t, v.Pause(ctx), "PATCH", "/vm", "before starting")
		wantError(t, v.CreateSnapshot(ctx, snapshot, memoryMiB), "PUT", "/snapshot/create", "before starting")
		wantError(t, v.Start(ctx), "PUT", "/actions", "without kernel")
		wantError(t, v.SetBootSource(ctx, firecracker.BootSource{Kernel: filepath.Join(dir, "none")}), "PUT", "/boot-source", "cannot be opened")
		serial := v.SetSerial(ctx, firecracker.Serial{Path: filepath.Join(dir, "serial")})
		if v.can.SerialPath {
			if serial != nil {
				t.Error(serial)
			}
		} else {
			wantError(t, serial, "PUT", "/serial", "Invalid request method and/or path")
		}
		v.boot(t)
		wantError(t, v.Start(ctx), "PUT", "/actions", "after starting")
		wantError(t, v.SetMachine(ctx, firecracker.MachineConfig{CPUs: 1, MemoryMiB: 1}), "PUT", "/machine-config", "after starting")
		wantError(t, v.CreateSnapshot(ctx, snapshot, memoryMiB), "PUT", "/snapshot/create", "unavailable while running")
		wantError(t, v.Load(ctx, v.can, firecracker.SnapshotLoad{}, memoryMiB), "PUT", "/snapshot/load", "after starting")
		v.wantState(t, firecracker.Running)
	})
}

func TestHinting(t *testing.T) {
	eachVersion(t, func(t *testing.T, version string) {
		v, ctx := start(t, version), t.Context()
		v.boot(t)
		if !v.can.BalloonHinting {
			_, err := v.Hinting(ctx, v.can)
			for _, err := range []error{err, v.StartHinting(ctx, v.can, true), v.StopHinting(ctx, v.can)} {
				if !errors.Is(err, sandbox.ErrInvalid) {
					t.Errorf("hinting where there is none: %v", err)
				}
			}
			return
		}
		if s, err := v.Hinting(ctx, v.can); err != nil || s.Host != firecracker.HintingStop || s.Guest != nil {
			t.Errorf("before the first run: %+v (%v)", s, err)
		}
		for run := range uint32(2) {
			if err := v.StartHinting(ctx, v.can, false); err != nil {
				t.Fatal(err)
			}
			if s, err := v.Hinting(ctx, v.can); err != nil || s.Host != firecracker.HintingDone+1+run || s.Guest == nil || *s.Guest != firecracker.HintingStop {
				t.Errorf("in a run: %+v (%v)", s, err)
			}
		}
		if err := v.StopHinting(ctx, v.can); err != nil {
			t.Fatal(err)
		}
		if s, err := v.Hinting(ctx, v.can); err != nil || s.Host != firecracker.HintingDone {
			t.Errorf("after the run: %+v (%v)", s, err)
		}
		if err := v.StartHinting(ctx, v.can, true); err != nil {
			t.Fatal(err)
		}
		if s, err := v.Hinting(ctx, v.can); err != nil || s.Host != firecracker.HintingDone {
			t.Errorf("after a run that ends by itself: %+v (%v)", s, err)
		}
	})
}

// processors is what of the host's a machine sees, in all the forms there are.
var processors = firecracker.CPUConfig{
	CPUID: []firecracker.CPUIDLeaf{{Leaf: 1, Registers: []firecracker.CPUIDRegister{{Register: "ecx", Bits: "0bx0"}}}},
	MSRs:  []firecracker.MSR{{Address: 0x10a, Bits: "0b0x"}},
}

func TestCPUConfig(t *testing.T) {
	eachVersion(t, func(t *testing.T, version string) {
		v := start(t, version)
		if err := v.SetCPU(t.Context(), v.can, processors); err != nil {
			t.Error(err)
		}
		if err := v.SetCPU(t.Context(), firecracker.Capabilities{}, processors); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("where there is none: %v", err)
		}
		v.boot(t)
		wantError(t, v.SetCPU(t.Context(), v.can, processors), "PUT", "/cpu-config", "after starting")
	})
}

// snapshot pauses and writes one.
func (v *vmm) snapshot(t *testing.T, kind string) firecracker.SnapshotCreate {
	t.Helper()
	dir := t.TempDir()
	s := firecracker.SnapshotCreate{Kind: kind, State: filepath.Join(dir, "state"), Memory: filepath.Join(dir, "memory")}
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := v.CreateSnapshot(t.Context(), s, memoryMiB); err != nil {
		t.Fatal(err)
	}
	return s
}

func wantPages(t *testing.T, path string, want ...int) {
	t.Helper()
	got, err := fake.Pages(path)
	if err != nil || !slices.Equal(got, want) {
		t.Fatalf("%s has pages %v (%v), want %v", path, got, err, want)
	}
}

func TestFullThenDiff(t *testing.T) {
	eachVersion(t, func(t *testing.T, version string) {
		v, ctx := start(t, version), t.Context()
		v.boot(t)
		full := v.snapshot(t, firecracker.Full)
		wantPages(t, full.Memory, fake.Counter, fake.First)

		clone := start(t, version)
		load := firecracker.SnapshotLoad{
			State: full.State, Memory: firecracker.MemoryBackend{Kind: firecracker.File, Path: full.Memory}, TrackDirty: true,
			Networks: []firecracker.NetworkOverride{{ID: "eth0", TAP: "tap1"}},
		}
		if err := clone.Load(ctx, clone.can, load, memoryMiB); err != nil {
			t.Fatal(err)
		}
		clone.wantState(t, firecracker.Paused)
		if err := clone.SetMMDS(ctx, map[string]string{"instanceID": "clone"}); err != nil {
			t.Fatal(err)
		}
		if err := clone.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		clone.expect(t, "guest counts 2")
		diff := clone.snapshot(t, firecracker.Diff)
		wantPages(t, diff.Memory, fake.Counter, fake.First+1)
		wantPages(t, full.Memory, fake.Counter, fake.First) // mapped privately
	})
}

func TestDiffWithoutTracking(t *testing.T) {
	eachVersion(t, func(t *testing.T, version string) {
		v := start(t, version)
		v.boot(t)
		if v.can.DiffWithoutTracking {
			wantPages(t, v.snapshot(t, firecracker.Diff).Memory, fake.Counter, fake.First)
			return
		}
		if err := v.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		s := firecracker.SnapshotCreate{Kind: firecracker.Diff, State: file(t), Memory: file(t)}
		wantError(t, v.CreateSnapshot(t.Context(), s, memoryMiB), "PUT", "/snapshot/create", "dirty page tracking")
	})
}

func TestLoadRefuses(t *testing.T) {
	eachVersion(t, func(t *testing.T, version string) {
		ctx := t.Context()
		v := start(t, version)
		v.boot(t)
		full := v.snapshot(t, firecracker.Full)
		load := firecracker.SnapshotLoad{State: full.State, Memory: firecracker.MemoryBackend{Kind: firecracker.File, Path: full.Memory}}

		configured := start(t, version)
		if err := configured.SetMachine(ctx, firecracker.MachineConfig{CPUs: 1, MemoryMiB: memoryMiB}); err != nil {
			t.Fatal(err)
		}
		wantError(t, configured.Load(ctx, v.can, load, memoryMiB), "PUT", "/snapshot/load", "not allowed after configuring")

		modern := load
		modern.ClockRealtime, modern.Vsock = true, &firecracker.VsockOverride{Path: "other"}
		fresh := start(t, version)
		err := fresh.Load(ctx, fresh.can, modern, memoryMiB)
		if v.can.ClockRealtime && err != nil || !v.can.ClockRealtime && !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("load with what 1.16 has: %v", err)
		}

		for _, other := range versions {
			w := start(t, other)
			err := w.Load(ctx, w.can, load, memoryMiB)
			if w.can.Snapshot == v.can.Snapshot {
				if err != nil {
					t.Errorf("%s does not load it: %v", other, err)
				}
				continue
			}
			wantError(t, err, "PUT", "/snapshot/load", "invalid format version")
			if w.cmd.Wait() == nil {
				t.Errorf("%s goes on after a load that failed", other)
			}
		}
	})
}

// startPager runs the real pager, in this process.
func startPager(t *testing.T) (*pager.Client, string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	socket, ready, served := filepath.Join(t.TempDir(), "pager.sock"), make(chan struct{}), make(chan error, 1)
	go func() {
		served <- pager.Serve(ctx, socket, slog.New(slog.DiscardHandler), func() { close(ready) })
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-ready:
	case err := <-served:
		t.Fatal(err)
	}
	client, err := pager.Dial(ctx, socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client, socket
}

// throughPager has memory come from the pager at socket.
func throughPager(socket string) firecracker.Config {
	return firecracker.Config{
		Pager:       func(ctx context.Context) (*pager.Client, error) { return pager.Dial(ctx, socket) },
		PagerSocket: socket,
	}
}

// The memory comes through the real pager, over a real userfaultfd.
func TestLoadThroughPager(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("userfaultfd for faults of the kernel needs root")
	}
	ctx := t.Context()
	client, _ := startPager(t)
	eachVersion(t, func(t *testing.T, version string) {
		v := start(t, version)
		v.boot(t)
		full := v.snapshot(t, firecracker.Full)
		dir := t.TempDir()
		importMemory(t, dir, full.Memory)
		vm := pager.VM{ID: "vm-" + version, Image: dir, Socket: filepath.Join(t.TempDir(), "uffd.sock"), UID: os.Getuid()}
		if err := client.Register(ctx, vm); err != nil {
			t.Fatal(err)
		}
		clone := start(t, version)
		load := firecracker.SnapshotLoad{State: full.State, Memory: firecracker.MemoryBackend{Kind: firecracker.Uffd, Path: vm.Socket}, TrackDirty: true}
		if err := clone.Load(ctx, clone.can, load, memoryMiB); err != nil {
			t.Fatal(err)
		}
		if err := clone.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		clone.expect(t, "guest counts 2") // what it had counted to came out of the image
		st, err := client.Status(ctx, vm.ID)
		if err != nil || st.State != pager.StateServed || st.Monitor.PID != clone.cmd.Process.Pid || st.Faults == 0 {
			t.Errorf("the pager says %+v (%v)", st, err)
		}
		wantPages(t, clone.snapshot(t, firecracker.Diff).Memory, fake.Counter, fake.First+1)
		wantPages(t, clone.snapshot(t, firecracker.Full).Memory, fake.Counter, fake.First, fake.First+1)
		if _, err := client.Remove(ctx, vm.ID); err != nil {
			t.Error(err)
		}
		if clone.cmd.Wait() == nil {
			t.Error("the pager does not end a machine that it gives up")
		}
	})
}

func importMemory(t *testing.T, dir, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := memory.Write(t.Context(), dir, memoryMiB<<20, nil, memory.SparseFile{File: f, Size: memoryMiB << 20}); err != nil {
		t.Fatal(err)
	}
}

// odd serves one answer to everything, on a path too long for a socket's address.
func odd(t *testing.T, handler http.HandlerFunc) *firecracker.Client {
	t.Helper()
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	l, err := net.Listen("unix", "api.sock")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	c := firecracker.NewClient(filepath.Join(dir, "api.sock"))
	t.Cleanup(c.Close)
	return c
}

func TestOddAnswers(t *testing.T) {
	for _, tc := range []struct {
		name, body, want string
		status           int
	}{
		{"fault", `{"fault_message":"no such thing"}`, "no such thing", 400},
		{"no JSON", "all is lost\n", "all is lost", 500},
		{"redirect", `{}`, "{}", 302},
		{"long", strings.Repeat("x", 10<<20), strings.Repeat("x", 500), 503},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := odd(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Location", "/elsewhere")
				w.WriteHeader(tc.status)
				_, _ = io.WriteString(w, tc.body) // the client stops reading a long one
			})
			var e *firecracker.Error
			if err := c.Pause(t.Context()); !errors.As(err, &e) || *e != (firecracker.Error{Method: "PATCH", Path: "/vm", Status: tc.status, Message: tc.want}) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestCallEndsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	c := odd(t, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // so that the end of the connection is seen
		cancel()
		<-r.Context().Done()
	})
	if err := c.Pause(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the end of the context", err)
	}
}
