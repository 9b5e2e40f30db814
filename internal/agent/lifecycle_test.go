package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/api/proto/hostagent/hostagentconnect"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// sandboxOf makes a sandbox with an environment, and a file in it.
func sandboxOf(t *testing.T, c hostagentconnect.HostAgentClient, change ...func(*hostagent.CreateSandboxRequest)) (id string, g guestAt) {
	t.Helper()
	req := &hostagent.CreateSandboxRequest{
		SandboxId: string(sandbox.NewID()), BuildId: buildID, AccessToken: "secret", EnvVars: map[string]string{"COLOUR": "red"},
		Resources: testResources(), AllowInternetAccess: true,
	}
	for _, f := range change {
		f(req)
	}
	resp, err := c.CreateSandbox(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return req.SandboxId, guestAt{resp.Address, req.AccessToken}
}

func testResources() *hostagent.Resources {
	return &hostagent.Resources{Cpus: 1, MemoryMib: 128, DiskMib: 64, Pids: 1024}
}

// guestAt is the guest agent of a sandbox.
type guestAt struct{ addr, token string }

func (g guestAt) call(t *testing.T, method, path, body string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+g.addr+":49983"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Access-Token", g.token)
	req.Header.Set("Content-Type", "application/octet-stream")
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

func (g guestAt) write(t *testing.T, path, text string) {
	t.Helper()
	if status, body := g.call(t, "POST", "/files?username=root&path="+path, text); status != 200 {
		t.Fatalf("write %s: %d %s", path, status, body)
	}
}

func (g guestAt) has(t *testing.T, path, text string) {
	t.Helper()
	if status, body := g.call(t, "GET", "/files?username=root&path="+path, ""); status != 200 || body != text {
		t.Errorf("%s is %d %q, want %q", path, status, body, text)
	}
}

// env returns a variable of the sandbox's environment.
func (g guestAt) env(t *testing.T, name string) string {
	t.Helper()
	status, body := g.call(t, "GET", "/envs", "")
	var env map[string]string
	if err := json.Unmarshal([]byte(body), &env); status != 200 || err != nil {
		t.Fatalf("environment: %d %s", status, body)
	}
	return env[name]
}

func (h *host) bootID(t *testing.T, g guestAt) string {
	t.Helper()
	status, body := g.call(t, "GET", "/files?username=root&path=/proc/sys/kernel/random/boot_id", "")
	if status != 200 || len(body) < 30 {
		t.Fatalf("boot id: %d %q", status, body)
	}
	return body
}

func pauseSandbox(t *testing.T, c hostagentconnect.HostAgentClient, id string, filesOnly bool) {
	t.Helper()
	resp, err := c.PauseSandbox(t.Context(), &hostagent.PauseSandboxRequest{SandboxId: id, FilesOnly: filesOnly})
	if err != nil {
		t.Fatal(err)
	}
	if resp.ImageBytes <= 0 {
		t.Errorf("image of %d bytes", resp.ImageBytes)
	}
	if st := states(t, c)[id]; st.GetState() != string(sandbox.Paused) || st.GetAddress() != "" {
		t.Errorf("after a pause: %v", st)
	}
}

func resumeSandbox(t *testing.T, c hostagentconnect.HostAgentClient, id string, boot bool) (guestAt, bool) {
	t.Helper()
	resp, err := c.ResumeSandbox(t.Context(), &hostagent.ResumeSandboxRequest{SandboxId: id, AccessToken: "secret", Boot: boot})
	if err != nil {
		t.Fatal(err)
	}
	return guestAt{resp.Address, "secret"}, resp.Booted
}

// instances are the ids of what runs, by the agent's directory.
func (h *host) instances(t *testing.T) (ids []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(h.dir, "agent", "instances"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids
}

// await polls what has no event of its own.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long: %s", what)
		}
	}
}

func TestAPausedSandboxHoldsNothingAndGoesOnFromWhereItWas(t *testing.T) {
	h := newHost(t)
	a, c := h.open(t)
	id, g := sandboxOf(t, c)
	for round := range 3 { // each from the image of the one before
		g.write(t, "/root/file", fmt.Sprint("round ", round))
		boot := h.bootID(t, g)
		pauseSandbox(t, c, id, false)
		if _, err := c.PauseSandbox(t.Context(), &hostagent.PauseSandboxRequest{SandboxId: id}); connect.CodeOf(err) != connect.CodeAlreadyExists {
			t.Errorf("second pause: %v", err)
		}
		if round == 0 {
			await(t, "the first instance, and that of the template's image, are freed", func() bool { return len(h.instances(t)) == 0 })
		}
		var booted bool
		g, booted = resumeSandbox(t, c, id, false)
		if _, err := c.ResumeSandbox(t.Context(), &hostagent.ResumeSandboxRequest{SandboxId: id}); connect.CodeOf(err) != connect.CodeAlreadyExists {
			t.Errorf("second resume: %v", err)
		}
		if booted || h.bootID(t, g) != boot {
			t.Error("it was booted anew")
		}
		g.has(t, "/root/file", fmt.Sprint("round ", round))
		if got := g.env(t, "COLOUR"); got != "red" {
			t.Errorf("COLOUR is %q", got)
		}
		if _, err := os.Stat(filepath.Join(h.dir, "agent", "sandboxes", id, "image")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("its image is left: %v", err)
		}
	}
	if status, _ := (guestAt{g.addr, "wrong"}).call(t, "GET", "/envs", ""); status != 401 {
		t.Errorf("a wrong token gives %d", status)
	}
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

func TestFilesAreWhatIsLeftWithoutMemory(t *testing.T) {
	h := newHost(t)
	a, c := h.open(t)
	for name, how := range map[string]struct{ filesOnly, boot bool }{
		"paused with files only":                {true, false},
		"paused with memory, resumed by a boot": {false, true},
	} {
		t.Run(name, func(t *testing.T) {
			id, g := sandboxOf(t, c)
			g.write(t, "/root/file", "kept")
			boot := h.bootID(t, g)
			pauseSandbox(t, c, id, how.filesOnly)
			g, booted := resumeSandbox(t, c, id, how.boot)
			if !booted || h.bootID(t, g) == boot {
				t.Error("it was not booted anew")
			}
			g.has(t, "/root/file", "kept")
			if got := g.env(t, "COLOUR"); got != "red" {
				t.Errorf("COLOUR is %q", got)
			}
			if got := g.env(t, "E2B_SANDBOX_ID"); got != id {
				t.Errorf("it takes itself for %q", got)
			}
		})
	}
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

func TestAPausedSandboxOutlivesItsAgent(t *testing.T) {
	h := newHost(t)
	first, c := h.open(t)
	id, g := sandboxOf(t, c)
	g.write(t, "/root/file", "kept")
	pauseSandbox(t, c, id, false)
	gone, _ := sandboxOf(t, c)
	pauseSandbox(t, c, gone, false)
	if err := first.Shutdown(t.Context()); err != nil { // ends what runs
		t.Fatal(err)
	}
	if left := h.instances(t); len(left) > 0 {
		t.Errorf("instances are left: %v", left)
	}
	second, c := h.open(t)
	if st := states(t, c)[id]; st.GetState() != string(sandbox.Paused) {
		t.Errorf("after a restart: %v", st)
	}
	g, _ = resumeSandbox(t, c, id, false)
	g.has(t, "/root/file", "kept")
	for _, id := range []string{id, gone, gone} {
		if _, err := c.StopSandbox(t.Context(), &hostagent.StopSandboxRequest{SandboxId: id}); err != nil {
			t.Error(err)
		}
	}
	if err := second.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

func TestWhatWasCutOffByTheAgentsDeathIsFinishedOrUndone(t *testing.T) {
	h := newHost(t)
	first, c := h.open(t)
	pausing, g := sandboxOf(t, c)
	g.write(t, "/root/file", "kept")
	resuming, _ := sandboxOf(t, c)
	pauseSandbox(t, c, resuming, false)
	written, _ := sandboxOf(t, c) // killed after the image was whole and before the record said so
	pauseSandbox(t, c, written, false)
	lost, _ := sandboxOf(t, c) // killed with its instance
	imageless, _ := sandboxOf(t, c)
	pauseSandbox(t, c, imageless, false)
	if err := first.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.killEngine(t, lost)
	for id, change := range map[string]func(map[string]any){
		pausing:  func(r map[string]any) { r["state"] = "pausing" },
		resuming: func(r map[string]any) { r["state"] = "resuming"; r["instance"] = string(sandbox.NewID()) },
		written: func(r map[string]any) {
			r["state"], r["instance"], r["runtime_state"] = "pausing", string(sandbox.NewID()), map[string]any{"engine": map[string]any{"pid": 0}}
		},
		lost: func(r map[string]any) { r["state"] = "pausing" },
	} {
		h.changeRecord(t, id, change)
	}
	half := filepath.Join(h.dir, "agent", "sandboxes", pausing, ".new-image")
	stray := filepath.Join(h.dir, "agent", "instances", string(sandbox.NewID()))
	unsealed := filepath.Join(h.dir, "agent", "images", ".new-"+string(sandbox.NewID()))
	for _, dir := range []string{half, stray, unsealed} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(filepath.Join(h.dir, "agent", "sandboxes", imageless, "image")); err != nil {
		t.Fatal(err)
	}

	second, c := h.open(t)
	var now map[string]*hostagent.SandboxStatus
	await(t, "the end of the killed one is noticed", func() bool {
		now = states(t, c)
		return sandbox.State(now[lost].GetState()).Final() && now[pausing].GetState() != string(sandbox.Pausing)
	})
	for id, want := range map[string]sandbox.State{
		pausing: sandbox.Running, resuming: sandbox.Paused, written: sandbox.Paused, lost: sandbox.Failed, imageless: sandbox.Failed,
	} {
		if st := now[id]; st.GetState() != string(want) || want == sandbox.Failed && st.GetReason() == "" {
			t.Errorf("%v, want %s", st, want)
		}
	}
	for _, dir := range []string{half, stray, unsealed} {
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left", dir)
		}
	}
	guestAt{now[pausing].GetAddress(), "secret"}.has(t, "/root/file", "kept")
	for _, id := range []string{resuming, written} {
		resumeSandbox(t, c, id, false)
	}
	if err := second.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

func TestAnEngineThatIsStillWritingHoldsUpItsOwnSandboxOnly(t *testing.T) {
	h := newHost(t)
	first, c := h.open(t)
	slow, g := sandboxOf(t, c)
	g.write(t, "/root/file", "kept")
	stopped, _ := sandboxOf(t, c)
	other, _ := sandboxOf(t, c)
	if err := first.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{slow, stopped} { // an engine that does not answer is as one that writes
		var instance string
		h.changeRecord(t, id, func(r map[string]any) {
			r["state"], instance = "pausing", r["instance"].(string)
		})
		if err := os.WriteFile(filepath.Join(h.dir, "agent", "instances", instance, "paused"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		h.signalEngine(t, id, syscall.SIGSTOP)
	}

	second, c := h.open(t)
	now := states(t, c)
	for id, want := range map[string]sandbox.State{slow: sandbox.Pausing, stopped: sandbox.Pausing, other: sandbox.Running} {
		if got := now[id].GetState(); got != string(want) {
			t.Errorf("%s is %s, want %s", id, got, want)
		}
	}
	if _, err := c.StopSandbox(t.Context(), &hostagent.StopSandboxRequest{SandboxId: stopped}); err != nil {
		t.Error(err)
	}
	h.signalEngine(t, slow, syscall.SIGCONT)
	await(t, "it goes on", func() bool {
		now = states(t, c)
		return now[slow].GetState() == string(sandbox.Running)
	})
	guestAt{now[slow].GetAddress(), "secret"}.has(t, "/root/file", "kept")
	if err := second.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

// signalEngine signals the sandbox kernel of a sandbox.
func (h *host) signalEngine(t *testing.T, id string, sig syscall.Signal) {
	t.Helper()
	h.changeRecord(t, id, func(r map[string]any) {
		pid := r["runtime_state"].(map[string]any)["engine"].(map[string]any)["pid"].(float64)
		if err := syscall.Kill(int(pid), sig); err != nil {
			t.Fatal(err)
		}
	})
}

func (h *host) changeRecord(t *testing.T, id string, change func(map[string]any)) {
	t.Helper()
	path := filepath.Join(h.dir, "agent", "sandboxes", id, "record.json")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var r map[string]any
	if err := json.Unmarshal(data, &r); err != nil {
		t.Fatal(err)
	}
	change(r)
	if data, err = json.Marshal(r); err == nil {
		err = os.WriteFile(path, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestAnImageThatIsNoGoodIsRefusedInWordsAndLeavesTheSandboxPaused(t *testing.T) {
	h := newHost(t)
	a, c := h.open(t)
	id, _ := sandboxOf(t, c)
	pauseSandbox(t, c, id, false)
	dir := filepath.Join(h.dir, "agent", "sandboxes", id, "image")
	largest, was := "", int64(0)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if fi, err := e.Info(); err == nil && fi.Size() > was {
			largest, was = filepath.Join(dir, e.Name()), fi.Size()
		}
	}
	manifest := filepath.Join(dir, "manifest.json")
	good, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(words string) {
		t.Helper()
		_, err := c.ResumeSandbox(t.Context(), &hostagent.ResumeSandboxRequest{SandboxId: id, AccessToken: "secret"})
		if connect.CodeOf(err) != connect.CodeAlreadyExists || !strings.Contains(err.Error(), words) || strings.Contains(err.Error(), h.dir) {
			t.Errorf("resume: %v, want %q", err, words)
		}
		if st := states(t, c)[id]; st.GetState() != string(sandbox.Paused) {
			t.Errorf("it is %v", st)
		}
	}
	if err := os.WriteFile(manifest, bytes.Replace(good, []byte(h.runtime.Version()), []byte("v9.9.9"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	refused("v9.9.9")
	if err := os.WriteFile(manifest, good, 0o600); err != nil {
		t.Fatal(err)
	}
	builds := filepath.Join(h.dir, "templates")
	if err := os.Rename(builds, builds+".away"); err != nil {
		t.Fatal(err)
	}
	refused("is not on this host")
	if err := os.Rename(builds+".away", builds); err != nil {
		t.Fatal(err)
	}
	kernel := filepath.Join(dir, "checkpoint.img")
	whole, err := os.ReadFile(kernel)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(kernel, make([]byte, len(whole)), 0o600); err != nil { // only the engine sees that
		t.Fatal(err)
	}
	refused("cannot load it")
	if err := os.Truncate(largest, was-1); err != nil {
		t.Fatal(err)
	}
	refused("damaged")
	_, err = c.SnapshotSandbox(t.Context(), &hostagent.SnapshotSandboxRequest{SandboxId: id, ImageId: string(sandbox.NewID())})
	if connect.CodeOf(err) != connect.CodeAlreadyExists || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("snapshot: %v", err)
	}
	if err := os.Remove(largest); err != nil {
		t.Fatal(err)
	}
	refused("damaged")
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	b, c := h.open(t) // an agent does not give up on it either
	if st := states(t, c)[id]; st.GetState() != string(sandbox.Paused) {
		t.Errorf("after a restart: %v", st)
	}
	if _, err := c.StopSandbox(t.Context(), &hostagent.StopSandboxRequest{SandboxId: id}); err != nil {
		t.Error(err)
	}
	if err := b.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

// unwritable is a runtime whose instances cannot be written to disk.
type unwritable struct{ runtime.Runtime }

func (s unwritable) Create(ctx context.Context, cfg runtime.Config) (runtime.Instance, error) {
	i, err := s.Runtime.Create(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return unwritableInstance{i}, nil
}

type unwritableInstance struct{ runtime.Instance }

func (i unwritableInstance) Snapshot(context.Context, runtime.Image, bool) error {
	return sandbox.Errorf(sandbox.ErrExhausted, "no space left on the disk")
}

func TestASandboxThatCannotBePausedRunsOn(t *testing.T) {
	h := newHost(t)
	h.runtime = unwritable{h.runtime}
	a, c := h.open(t)
	id, g := sandboxOf(t, c)
	g.write(t, "/root/file", "kept")
	_, err := c.PauseSandbox(t.Context(), &hostagent.PauseSandboxRequest{SandboxId: id})
	if connect.CodeOf(err) != connect.CodeResourceExhausted || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("pause: %v", err)
	}
	if st := states(t, c)[id]; st.GetState() != string(sandbox.Running) || st.GetAddress() != g.addr {
		t.Errorf("after a failed pause: %v", st)
	}
	g.has(t, "/root/file", "kept")
	_, err = c.SnapshotSandbox(t.Context(), &hostagent.SnapshotSandboxRequest{SandboxId: id, ImageId: string(sandbox.NewID())})
	if connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("snapshot: %v", err)
	}
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

func TestSandboxesOfASnapshotAreTheirOwn(t *testing.T) {
	h := newHost(t)
	a, c := h.open(t)
	id, g := sandboxOf(t, c)
	g.write(t, "/root/file", "before")
	for name, paused := range map[string]bool{"running": false, "paused": true} {
		if paused {
			pauseSandbox(t, c, id, false)
		}
		image := string(sandbox.NewID())
		snap := func() error {
			_, err := c.SnapshotSandbox(t.Context(), &hostagent.SnapshotSandboxRequest{SandboxId: id, ImageId: image})
			return err
		}
		if err := snap(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := snap(); connect.CodeOf(err) != connect.CodeAlreadyExists {
			t.Errorf("%s: snapshot under a taken id: %v", name, err)
		}
		if paused {
			g, _ = resumeSandbox(t, c, id, false) // the image is not the sandbox's
		}
		g.write(t, "/root/file", "after")
		for i := range 2 {
			token := fmt.Sprint("token ", i)
			child, cg := sandboxOf(t, c, func(r *hostagent.CreateSandboxRequest) {
				r.ImageId, r.ImageAccessToken, r.AccessToken = image, "secret", token
				if r.EnvVars = nil; i == 1 {
					r.EnvVars = map[string]string{"SHAPE": "round"}
				}
			})
			cg.has(t, "/root/file", "before")
			if got := cg.env(t, "E2B_SANDBOX_ID"); got != child {
				t.Errorf("%s: the child takes itself for %q", name, got)
			}
			if colour, shape := cg.env(t, "COLOUR"), cg.env(t, "SHAPE"); colour != "red" || (shape == "round") != (i == 1) {
				t.Errorf("%s: its environment has %q, %q", name, colour, shape)
			}
			if status, _ := (guestAt{cg.addr, "secret"}).call(t, "GET", "/envs", ""); status != 401 {
				t.Errorf("%s: the parent's token gives %d", name, status)
			}
			cg.write(t, "/root/file", "the child's")
			g.has(t, "/root/file", "after")
		}
		g.write(t, "/root/file", "before")
		list, err := c.ListImages(t.Context(), &hostagent.ListImagesRequest{})
		if err != nil || len(list.Images) != 1 || list.Images[0].ImageId != image || list.Images[0].Bytes <= 0 {
			t.Errorf("%s: images: %v, %v", name, list, err)
		}
		for range 2 {
			if _, err := c.DeleteImage(t.Context(), &hostagent.DeleteImageRequest{ImageId: image}); err != nil {
				t.Error(err)
			}
		}
		_, err = c.CreateSandbox(t.Context(), &hostagent.CreateSandboxRequest{
			SandboxId: string(sandbox.NewID()), BuildId: buildID, Resources: testResources(), ImageId: image,
		})
		if connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("%s: create of an image that is gone: %v", name, err)
		}
	}
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

func TestThePoolGivesOutFreshSandboxesOnly(t *testing.T) {
	h := newHost(t)
	h.pool = 512 << 20
	a, c := h.open(t)
	if _, err := c.PrepareTemplate(t.Context(), &hostagent.PrepareTemplateRequest{BuildId: buildID, Resources: testResources()}); err != nil {
		t.Fatal(err)
	}
	taken := map[string]bool{} // instances that were somebody's
	waiting := func() (ids []string) {
		for _, id := range h.instances(t) {
			if !taken[id] {
				ids = append(ids, id)
			}
		}
		return ids
	}
	ready := func() { t.Helper(); await(t, "one waits", func() bool { return a.Ready() > 0 }) }
	start := func(change ...func(*hostagent.CreateSandboxRequest)) (string, guestAt) {
		t.Helper()
		req := &hostagent.CreateSandboxRequest{
			SandboxId: string(sandbox.NewID()), BuildId: buildID, AccessToken: "secret", AllowInternetAccess: true, Resources: testResources(),
		}
		for _, f := range change {
			f(req)
		}
		resp, err := c.CreateSandbox(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(filepath.Join(h.dir, "agent", "sandboxes", req.SandboxId, "record.json"))
		if err != nil {
			t.Fatal(err)
		}
		var r struct{ Instance string }
		if err := json.Unmarshal(data, &r); err != nil {
			t.Fatal(err)
		}
		if taken[r.Instance] {
			t.Error("an instance was given out twice")
		}
		taken[r.Instance] = true
		return resp.StartedFrom, guestAt{resp.Address, "secret"}
	}
	for range 3 {
		ready()
		from, g := start()
		if from != "pool" {
			t.Errorf("started from %q", from)
		}
		if status, _ := g.call(t, "GET", "/files?username=root&path=/root/file", ""); status != 404 {
			t.Errorf("a fresh sandbox has a file of another: %d", status)
		}
		g.write(t, "/root/file", "used")
	}
	for name, change := range map[string]func(*hostagent.CreateSandboxRequest){
		"memory":      func(r *hostagent.CreateSandboxRequest) { r.Resources.MemoryMib = 256 },
		"processors":  func(r *hostagent.CreateSandboxRequest) { r.Resources.Cpus = 2 },
		"no internet": func(r *hostagent.CreateSandboxRequest) { r.AllowInternetAccess = false },
		"asked for":   func(r *hostagent.CreateSandboxRequest) { r.Start = "boot" },
	} {
		ready()
		if from, _ := start(change); from == "pool" {
			t.Errorf("%s: started from the pool", name)
		}
	}
	// What ended while it waited is nobody's.
	ready()
	for _, id := range waiting() {
		if _, err := os.Stat("/sys/fs/cgroup/pids/wrenn-" + h.tag + "/" + id); err == nil {
			h.killInstance(t, id)
		}
	}
	if from, g := start(); from == "" || g.env(t, "E2B_SANDBOX") != "true" {
		t.Errorf("started from %q", from)
	}
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := waiting(); len(left) > 0 {
		t.Errorf("what waited is left: %v", left)
	}
	b, c := h.open(t)
	for id := range states(t, c) {
		if _, err := c.StopSandbox(t.Context(), &hostagent.StopSandboxRequest{SandboxId: id}); err != nil {
			t.Error(err)
		}
	}
	if err := b.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

func TestThePoolGivesItsAddressesBackWhenThereAreNoOthers(t *testing.T) {
	h := newHost(t)
	h.pool, h.cidr = 512<<20, netip.MustParsePrefix("10.212.78.8/29") // four slots
	a, c := h.open(t)
	for range 4 {
		if _, err := create(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		await(t, "one waits, or nothing is left for it", func() bool { return a.Ready() > 0 || len(h.instances(t)) >= 4 })
	}
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

func TestAStopBreaksOffAPauseAndAResume(t *testing.T) {
	h := newHost(t)
	a, c := h.open(t)
	for _, what := range []string{"pause", "resume", "snapshot"} {
		for _, after := range []time.Duration{0, 5, 20, 60, 120} {
			id, _ := sandboxOf(t, c)
			if what == "resume" {
				pauseSandbox(t, c, id, false)
			}
			image := string(sandbox.NewID())
			var over atomic.Bool
			done := make(chan struct{})
			go func() {
				defer close(done)
				switch what { // each may win or lose
				case "pause":
					_, _ = c.PauseSandbox(t.Context(), &hostagent.PauseSandboxRequest{SandboxId: id})
				case "resume":
					_, _ = c.ResumeSandbox(t.Context(), &hostagent.ResumeSandboxRequest{SandboxId: id, AccessToken: "secret"})
				case "snapshot":
					_, _ = c.SnapshotSandbox(t.Context(), &hostagent.SnapshotSandboxRequest{SandboxId: id, ImageId: image})
				}
				over.Store(true)
			}()
			select {
			case <-done:
			case <-time.After(after * time.Millisecond):
			}
			if _, err := c.StopSandbox(t.Context(), &hostagent.StopSandboxRequest{SandboxId: id}); err != nil {
				t.Errorf("%s: stop: %v", what, err)
			}
			if st := states(t, c)[id]; st.GetState() != string(sandbox.Stopped) {
				t.Errorf("%s: %v", what, st)
			}
			<-done
			if _, err := c.DeleteImage(t.Context(), &hostagent.DeleteImageRequest{ImageId: image}); err != nil {
				t.Error(err)
			}
		}
	}
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}
