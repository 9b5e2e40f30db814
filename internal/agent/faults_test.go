package agent_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

func TestADamagedRecordCostsItsSandboxAndNoOther(t *testing.T) {
	h := newHost(t)
	first, c := h.open(t)
	var ids []string
	for range 4 {
		id, err := create(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	if err := first.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, damage := range []func(map[string]any){
		func(r map[string]any) { delete(r, "runtime_state") },
		func(r map[string]any) { r["runtime_state"] = "x" },
		func(r map[string]any) { r["runtime_state"] = map[string]any{} },
	} {
		path := filepath.Join(h.dir, "agent", "sandboxes", ids[i], "record.json")
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var r map[string]any
		if err := json.Unmarshal(data, &r); err != nil {
			t.Fatal(err)
		}
		damage(r)
		if data, err = json.Marshal(r); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	second, c := h.open(t)
	now := states(t, c)
	for i, id := range ids {
		want := sandbox.Failed
		if i == 3 {
			want = sandbox.Running
		}
		if s := now[id]; s.GetState() != string(want) {
			t.Errorf("sandbox %d is %v, want %s", i, s, want)
		}
	}
	if err := second.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

func TestWhenEveryAddressIsTakenCreatesSayWhatToDo(t *testing.T) {
	h := newHost(t)
	h.cidr = netip.MustParsePrefix("10.212.77.8/30") // two slots
	a, c := h.open(t)
	first, err := create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := create(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if _, err := create(t.Context(), c); connect.CodeOf(err) != connect.CodeResourceExhausted || !strings.Contains(err.Error(), "--network-cidr") {
		t.Errorf("third create: %v", err)
	}
	if _, err := c.StopSandbox(t.Context(), &hostagent.StopSandboxRequest{SandboxId: first}); err != nil {
		t.Fatal(err)
	}
	if _, err := create(t.Context(), c); err != nil {
		t.Errorf("create after one had ended: %v", err)
	}
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

// busy is a runtime that cannot discard anything at the first try.
type busy struct {
	runtime.Runtime
	asked atomic.Bool
}

func (b *busy) Discard(ctx context.Context, id sandbox.ID, state json.RawMessage) error {
	if !b.asked.Swap(true) {
		return errors.New("device or resource busy")
	}
	return b.Runtime.Discard(ctx, id, state)
}

// small is a runtime whose smaller images are what the others are.
type small struct {
	runtime.Runtime
	begun chan struct{} // gets a value when a compression begins
	goOn  chan struct{} // lets it go on
}

func (s *small) Compress(ctx context.Context, image runtime.Image, dir string) error {
	select {
	case s.begun <- struct{}{}:
	case <-ctx.Done(): // before anybody has looked
		return ctx.Err()
	}
	select {
	case <-s.goOn:
	case <-ctx.Done():
		return ctx.Err()
	}
	entries, err := os.ReadDir(image.Dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == "manifest.json" {
			continue
		}
		if err := os.Link(filepath.Join(image.Dir, e.Name()), filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func TestAPausedSandboxIsResumedWhileItsImageIsMadeSmaller(t *testing.T) {
	h := newHost(t)
	rt := &small{Runtime: h.runtime, begun: make(chan struct{}), goOn: make(chan struct{})}
	h.runtime, h.compressAfter = rt, time.Millisecond
	a, c := h.open(t)
	id, err := create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(h.dir, "agent", "sandboxes", id, "image")
	compressed := func() bool {
		data, err := os.ReadFile(filepath.Join(image, "manifest.json"))
		return err == nil && strings.Contains(string(data), `"compressed":true`)
	}
	for range 2 { // the second compression is of another image than the first
		pauseSandbox(t, c, id, false)
		<-rt.begun
		resumeSandbox(t, c, id, false) // breaks it off
		pauseSandbox(t, c, id, false)
		<-rt.begun
		if compressed() {
			t.Error("an image was made one that is of an earlier pause")
		}
		if _, err := c.PauseSandbox(t.Context(), &hostagent.PauseSandboxRequest{SandboxId: id}); err == nil {
			t.Error("it was paused twice")
		}
		select {
		case rt.goOn <- struct{}{}:
		case <-time.After(20 * time.Second):
			t.Fatal("it was given up for a request that was refused")
		}
		await(t, "the image is made smaller", compressed)
		resumeSandbox(t, c, id, false)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(image), ".*")); len(left) > 0 {
		t.Errorf("left beside the image: %v", left)
	}
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

// TestAnImageIsMadeSmallerOnlyWhereThereIsRoom has a disk on which new sandboxes are refused,
// and what a kill in the middle of an exchange leaves.
func TestAnImageIsMadeSmallerOnlyWhereThereIsRoom(t *testing.T) {
	mount := t.TempDir()
	if err := unix.Mount("wrenn-test", mount, "tmpfs", 0, "size=2g"); err != nil {
		t.Skip("cannot mount: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	t.Setenv("TMPDIR", mount)
	h := newHost(t)
	rt := &small{Runtime: h.runtime, begun: make(chan struct{}, 1), goOn: make(chan struct{})}
	h.runtime = rt
	a, c := h.open(t)
	id, err := create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	pauseSandbox(t, c, id, false)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	larger := filepath.Join(h.dir, "agent", "sandboxes", id, ".small-image")
	if err := os.Mkdir(larger, 0o700); err != nil {
		t.Fatal(err)
	}
	filler, err := os.Create(filepath.Join(mount, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	var fs unix.Statfs_t
	if err := unix.Statfs(mount, &fs); err != nil {
		t.Fatal(err)
	}
	const spare = 512 << 10 // over what is kept free, and less than the image
	if err := unix.Fallocate(int(filler.Fd()), 0, 0, int64(fs.Bavail)*fs.Bsize-1<<30-spare); err != nil {
		t.Fatal(err)
	}
	h.compressAfter = 20 * time.Millisecond
	a, _ = h.open(t)
	if _, err := os.Stat(larger); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what an exchange left is there: %v", err)
	}
	select {
	case <-rt.begun:
		t.Error("an image is made smaller where there is no room for another")
	case <-time.After(20 * h.compressAfter):
	}
	if err := filler.Truncate(0); err != nil {
		t.Fatal(err)
	}
	<-rt.begun
	rt.goOn <- struct{}{}
	await(t, "the image is made smaller", func() bool {
		data, err := os.ReadFile(filepath.Join(h.dir, "agent", "sandboxes", id, "image", "manifest.json"))
		return err == nil && strings.Contains(string(data), `"compressed":true`)
	})
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// wedged is a runtime whose images of memory do not load, not for what is in them. It
// counts how often the files of such an image are asked for.
type wedged struct {
	runtime.Runtime
	files atomic.Int32
}

func (w *wedged) Restore(ctx context.Context, cfg runtime.Config, image runtime.Image) (runtime.Instance, error) {
	if ofSandbox(image) && image.Kind == runtime.ImageMemory {
		return nil, errors.New("the machine was ended: block 7 is not what was written")
	}
	if ofSandbox(image) {
		w.files.Add(1)
	}
	return w.Runtime.Restore(ctx, cfg, image)
}

func TestADiskIsBootedWhateverIsWrongWithTheMemory(t *testing.T) {
	h := newHost(t)
	rt := &wedged{Runtime: h.runtime}
	h.runtime = rt
	a, c := h.open(t)
	id, err := create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	pauseSandbox(t, c, id, false)
	boot := func(want int32) {
		t.Helper()
		// gVisor has no disk without the memory, and says so.
		_, err := c.ResumeSandbox(t.Context(), &hostagent.ResumeSandboxRequest{SandboxId: id, AccessToken: "secret", Boot: true})
		if err == nil || rt.files.Load() != want {
			t.Errorf("the disk was tried %d times, want %d (%v)", rt.files.Load(), want, err)
		}
	}
	boot(1)
	image := filepath.Join(h.dir, "agent", "sandboxes", id, "image")
	files, err := filepath.Glob(filepath.Join(image, "*.img"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	if err := os.Remove(files[0]); err != nil {
		t.Fatal(err)
	}
	boot(2)
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestWhatCannotBeFreedAtTheStartKeepsNoSandboxFromItsOwner(t *testing.T) {
	h := newHost(t)
	first, c := h.open(t)
	id, err := create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	stray := filepath.Join(h.dir, "agent", "instances", string(sandbox.NewID()))
	if err := os.Mkdir(stray, 0o700); err != nil {
		t.Fatal(err)
	}
	h.runtime = &busy{Runtime: h.runtime}
	second, c := h.open(t)
	if st := states(t, c)[id]; st.GetState() != string(sandbox.Running) {
		t.Errorf("the sandbox is %v", st)
	}
	await(t, "the stray is freed", func() bool {
		_, err := os.Stat(stray)
		return errors.Is(err, os.ErrNotExist)
	})
	if err := second.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

// stubborn is a runtime whose instances cannot be stopped at the first try.
type stubborn struct{ runtime.Runtime }

func (s stubborn) Create(ctx context.Context, cfg runtime.Config) (runtime.Instance, error) {
	i, err := s.Runtime.Create(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return &stubbornInstance{Instance: i}, nil
}

type stubbornInstance struct {
	runtime.Instance
	asked atomic.Bool
}

func (i *stubbornInstance) Stop(ctx context.Context) error {
	if !i.asked.Swap(true) {
		return errors.New("device or resource busy")
	}
	return i.Instance.Stop(ctx)
}

func TestFreeingASandboxThatEndedByItselfIsTriedAgain(t *testing.T) {
	h := newHost(t)
	h.runtime = stubborn{h.runtime}
	a, c := h.open(t)
	id, err := create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	ends, err := c.WatchSandboxes(ctx, &hostagent.WatchSandboxesRequest{})
	if err != nil || !ends.Receive() {
		t.Fatalf("watch: %v, %v", err, ends.Err())
	}
	h.killEngine(t, id)
	announced := false
	for !announced && ends.Receive() {
		announced = ends.Msg().Ended != nil
	}
	if !announced {
		t.Errorf("its end was not announced: %v", ends.Err())
	}
	cancel()
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}
