package controlplane_test

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/controlplane"
	"github.com/wrenn/wrenn/internal/controlplane/controlplanetest"
	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
	"github.com/wrenn/wrenn/internal/store/sqlite"
)

var _ proxy.Resolver = (*controlplane.ControlPlane)(nil)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what is to happen at once.
const patience = 20 * time.Second

const team = controlplane.DefaultTeam

// rig is a control plane on a real store and a host agent in memory.
type rig struct {
	*controlplane.ControlPlane
	t      *testing.T
	agent  *controlplanetest.Agent
	store  store.Store
	gone   chan string // ids that OnGone was called with
	limits controlplane.Limits
	halt   func() // ends Run
}

func newRig(t *testing.T) *rig {
	t.Helper()
	db, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "wrenn.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	r := &rig{t: t, agent: controlplanetest.NewAgent(t), store: db, gone: make(chan string, 10000)}
	r.fresh()
	if _, err := r.Bootstrap(t.Context(), "e2b_00ff"); err != nil {
		t.Fatal(err)
	}
	err = r.PutTemplate(t.Context(), store.Template{
		ID: "tpl1", Alias: "base", Public: true, BuildID: "b1", CPUs: 2, MemoryMiB: 512, DiskMiB: 1024,
		User: "user", Workdir: "/home/user",
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// fresh replaces the control plane as a restart does: only the store stays.
func (r *rig) fresh() {
	r.ControlPlane = controlplane.New(controlplane.Config{
		Store: r.store, Agent: r.agent.Client, HostID: "h1", MasterKey: []byte("master"),
		Log: slog.New(slog.DiscardHandler), OnGone: func(id string) { r.gone <- id },
		Limits: r.limits,
	})
}

// run starts the control plane's own work and returns once it follows the agent.
func (r *rig) run() *rig {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	r.halt = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("run: %v", err)
		}
	})
	r.t.Cleanup(r.halt)
	r.agent.AwaitWatcher()
	return r
}

func (r *rig) create(timeout time.Duration) sandbox.Sandbox {
	r.t.Helper()
	b, err := r.Create(r.t.Context(), team, controlplane.CreateRequest{Template: "base", Timeout: timeout, Secured: true})
	if err != nil {
		r.t.Fatal(err)
	}
	return b
}

func (r *rig) record(id sandbox.ID) sandbox.Sandbox {
	r.t.Helper()
	b, err := r.store.Sandboxes().Get(r.t.Context(), id)
	if err != nil {
		r.t.Fatal(err)
	}
	return b
}

// await returns the record once it is in that state.
func (r *rig) await(id sandbox.ID, state sandbox.State) sandbox.Sandbox {
	r.t.Helper()
	for end := time.Now().Add(patience); ; {
		b := r.record(id)
		if b.State == state {
			return b
		}
		if time.Now().After(end) {
			r.t.Fatalf("sandbox is %s (%q), want %s", b.State, b.Reason, state)
		}
		<-time.After(2 * time.Millisecond) // between looks; the store has no event for this
	}
}

func (r *rig) only() sandbox.Sandbox {
	r.t.Helper()
	list, err := r.store.Sandboxes().List(r.t.Context(), store.Filter{})
	if err != nil || len(list) != 1 {
		r.t.Fatalf("want one record, have %d, %v", len(list), err)
	}
	return list[0]
}

func (r *rig) nothingLives() {
	r.t.Helper()
	if ids := r.agent.Living(); len(ids) != 0 {
		r.t.Errorf("the agent still has %v", ids)
	}
}

func is(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got error %v, want %v", err, want)
	}
}

func contains(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%q does not say %q", text, p)
		}
	}
}

func TestACreatedSandboxIsWhatWasAskedForAndIsFound(t *testing.T) {
	r := newRig(t).run()
	b, err := r.Create(t.Context(), team, controlplane.CreateRequest{
		Template: "default/base:default", Timeout: time.Minute, Secured: true, AllowInternetAccess: true,
		Metadata: map[string]string{"a": "b"}, EnvVars: map[string]string{"X": "y"},
		Resources: sandbox.Resources{CPUs: 1},
	})
	if err != nil {
		t.Fatal(err)
	}
	req := r.agent.Created(b.ID)
	want := &hostagent.CreateSandboxRequest{
		SandboxId: string(b.ID), TemplateId: "tpl1", BuildId: "b1", AccessToken: r.AccessToken(b.ID),
		Resources: &hostagent.Resources{Cpus: 1, MemoryMib: 512, DiskMib: 1024, Pids: 4096},
		EnvVars:   map[string]string{"X": "y"}, AllowInternetAccess: true, DefaultUser: "user", DefaultWorkdir: "/home/user",
	}
	if req.String() != want.String() {
		t.Errorf("the agent was asked for\n%v\nwant\n%v", req, want)
	}
	got, err := r.Get(t.Context(), team, b.ID)
	if err != nil || got.State != sandbox.Running || got.EnvdVersion != "0.6.99" || got.Spec.Metadata["a"] != "b" {
		t.Errorf("get: %+v, %v", got, err)
	}
	if d := got.Ends.Sub(got.Started); d != time.Minute {
		t.Errorf("it lives for %v", d)
	}
	target, err := r.Resolve(t.Context(), string(b.ID))
	if err != nil || target.Addr.String() != b.Address || target.SandboxID != string(b.ID) {
		t.Errorf("resolve: %v, %v", target, err)
	}
	_, err = r.Resolve(t.Context(), string(sandbox.NewID()))
	is(t, err, sandbox.ErrNotFound)
}

func TestResolvingARunningSandboxAsksNoDatabase(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Minute)
	r.store.Close()
	if _, err := r.Resolve(t.Context(), string(b.ID)); err != nil {
		t.Error(err)
	}
}

func TestSandboxesOfAnotherTeamDoNotExist(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Minute)
	ctx := t.Context()
	_, err := r.Get(ctx, "other", b.ID)
	is(t, err, sandbox.ErrNotFound)
	is(t, r.Kill(ctx, "other", b.ID), sandbox.ErrNotFound)
	is(t, r.SetTimeout(ctx, "other", b.ID, time.Second), sandbox.ErrNotFound)
	is(t, r.Refresh(ctx, "other", b.ID, time.Second), sandbox.ErrNotFound)
	_, _, err = r.Connect(ctx, "other", b.ID, controlplane.ConnectRequest{Timeout: time.Second})
	is(t, err, sandbox.ErrNotFound)
	_, err = r.Metrics(ctx, "other", b.ID, time.Time{}, time.Time{})
	is(t, err, sandbox.ErrNotFound)
	_, err = r.Logs(ctx, "other", b.ID, time.Time{})
	is(t, err, sandbox.ErrNotFound)
	latest, err := r.LatestMetrics(ctx, "other", []sandbox.ID{b.ID})
	if err != nil || len(latest) != 0 {
		t.Errorf("metrics of a foreign sandbox: %v, %v", latest, err)
	}
	list, err := r.List(ctx, "other", store.Filter{TeamID: team})
	if err != nil || len(list) != 0 {
		t.Errorf("list has a foreign sandbox: %v, %v", list, err)
	}
	if r.record(b.ID).State != sandbox.Running {
		t.Error("a foreign call changed it")
	}
}

func TestKillEndsASandboxOnceAndSaysSoAfterwards(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Minute)
	if err := r.Kill(t.Context(), team, b.ID); err != nil {
		t.Fatal(err)
	}
	r.nothingLives()
	if id := <-r.gone; id != string(b.ID) {
		t.Errorf("told that %s is gone", id)
	}
	_, err := r.Resolve(t.Context(), string(b.ID))
	is(t, err, sandbox.ErrNotFound)
	is(t, r.Kill(t.Context(), team, b.ID), sandbox.ErrNotFound)
	_, err = r.Get(t.Context(), team, b.ID)
	is(t, err, sandbox.ErrNotFound)
	contains(t, err.Error(), "ended at", "killed")
	_, _, err = r.Connect(t.Context(), team, b.ID, controlplane.ConnectRequest{Timeout: time.Minute})
	is(t, err, sandbox.ErrNotFound)
}

func TestASecondKillWaitsForTheFirst(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Minute)
	stopping, proceed := make(chan struct{}), make(chan struct{})
	r.agent.SetHooks(nil, func(context.Context, string) error { close(stopping); <-proceed; return nil })
	results := make(chan error, 9)
	kill := func() { results <- r.Kill(t.Context(), team, b.ID) }
	go kill()
	<-stopping
	for range 8 {
		go kill()
	}
	_, _, err := r.Connect(t.Context(), team, b.ID, controlplane.ConnectRequest{Timeout: time.Minute})
	is(t, err, sandbox.ErrConflict)
	select {
	case err := <-results:
		t.Errorf("a kill returned (%v) before the sandbox was gone", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(proceed)
	for range 9 {
		// Those that came after the end find nothing to kill.
		if err := <-results; err != nil && !errors.Is(err, sandbox.ErrNotFound) {
			t.Error(err)
		}
	}
	if n := r.agent.Stops(b.ID); n != 1 {
		t.Errorf("the agent was asked %d times", n)
	}
}

func TestAFailedCreateLeavesARecordOfItsReasonAndNothingElse(t *testing.T) {
	for _, c := range []struct {
		name   string
		err    error
		kind   error
		reason string
	}{
		{"internal", connect.NewError(connect.CodeInternal, errors.New("secret detail")), nil, "the host could not start it"},
		{"full", connect.NewError(connect.CodeResourceExhausted, errors.New("no slot is free")), sandbox.ErrUnavailable, "no slot is free"},
		{"no build", connect.NewError(connect.CodeNotFound, errors.New("build b1 is not on this host")), sandbox.ErrNotFound, "build b1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			r.agent.SetHooks(func(context.Context, *hostagent.CreateSandboxRequest) error { return c.err }, nil)
			_, err := r.Create(t.Context(), team, controlplane.CreateRequest{Template: "base", Timeout: time.Minute})
			if err == nil || sandbox.Kind(err) != c.kind {
				t.Errorf("got %v of kind %v, want kind %v", err, sandbox.Kind(err), c.kind)
			}
			b := r.only()
			if b.State != sandbox.Failed || b.Ended.IsZero() {
				t.Errorf("state is %s", b.State)
			}
			contains(t, b.Reason, "create failed", c.reason)
			if strings.Contains(b.Reason, "secret") {
				t.Errorf("reason shows internals: %q", b.Reason)
			}
			if r.agent.Stops(b.ID) != 1 {
				t.Error("the agent was not asked to make sure that nothing is left")
			}
			_, err = r.Resolve(t.Context(), string(b.ID))
			is(t, err, sandbox.ErrNotFound)
		})
	}
}

func TestACreatorThatGoesAwayLeavesNoSandbox(t *testing.T) {
	for _, c := range []struct {
		name string
		hook func(ctx context.Context) error // of the agent, called after the creator has gone
	}{
		{"and the agent notices", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }},
		{"and the agent finishes nevertheless", func(context.Context) error { return nil }},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			ctx, leave := context.WithCancel(t.Context())
			finished := make(chan struct{})
			r.agent.SetHooks(func(rpc context.Context, _ *hostagent.CreateSandboxRequest) error {
				defer close(finished)
				leave()
				return c.hook(rpc)
			}, func(context.Context, string) error { <-finished; return nil })
			if _, err := r.Create(ctx, team, controlplane.CreateRequest{Template: "base", Timeout: time.Minute}); err == nil {
				t.Error("create succeeded for nobody")
			}
			if b := r.only(); b.State != sandbox.Failed || r.agent.Stops(b.ID) == 0 {
				t.Errorf("record says %s: %s; stops: %d", b.State, b.Reason, r.agent.Stops(b.ID))
			}
		})
	}
}

func TestASandboxIsKilledWhileItIsBeingCreated(t *testing.T) {
	r := newRig(t)
	began := make(chan sandbox.ID, 1)
	r.agent.SetHooks(func(ctx context.Context, req *hostagent.CreateSandboxRequest) error {
		began <- sandbox.ID(req.SandboxId)
		<-ctx.Done()
		return ctx.Err()
	}, nil)
	created := make(chan error, 1)
	go func() {
		_, err := r.Create(t.Context(), team, controlplane.CreateRequest{Template: "base", Timeout: time.Minute})
		created <- err
	}()
	id := <-began
	if err := r.Kill(t.Context(), team, id); err != nil {
		t.Error(err)
	}
	is(t, <-created, sandbox.ErrConflict)
	r.nothingLives()
	if b := r.record(id); b.State != sandbox.Stopped {
		t.Errorf("state is %s", b.State)
	}
}

func TestBadRequestsChangeNothing(t *testing.T) {
	r := newRig(t)
	if err := r.store.Teams().Insert(t.Context(), store.Team{ID: "t2", Slug: "t2"}); err != nil {
		t.Fatal(err)
	}
	if err := r.PutTemplate(t.Context(), store.Template{ID: "tpl2", Alias: "theirs", TeamID: "t2", BuildID: "b2"}); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*controlplane.CreateRequest)
		kind   error
	}{
		"no timeout":             {func(c *controlplane.CreateRequest) { c.Timeout = 0 }, sandbox.ErrInvalid},
		"a negative timeout":     {func(c *controlplane.CreateRequest) { c.Timeout = -1 }, sandbox.ErrInvalid},
		"too long a timeout":     {func(c *controlplane.CreateRequest) { c.Timeout = 24*time.Hour + 1 }, sandbox.ErrInvalid},
		"an unknown template":    {func(c *controlplane.CreateRequest) { c.Template = "nope" }, sandbox.ErrNotFound},
		"an unknown tag":         {func(c *controlplane.CreateRequest) { c.Template = "base:v2" }, sandbox.ErrNotFound},
		"another namespace":      {func(c *controlplane.CreateRequest) { c.Template = "t2/base" }, sandbox.ErrNotFound},
		"another team's":         {func(c *controlplane.CreateRequest) { c.Template = "theirs" }, sandbox.ErrForbidden},
		"too many CPUs":          {func(c *controlplane.CreateRequest) { c.Resources.CPUs = 9 }, sandbox.ErrInvalid},
		"less than no memory":    {func(c *controlplane.CreateRequest) { c.Resources.MemoryMiB = -1 }, sandbox.ErrInvalid},
		"a disk of absurd size":  {func(c *controlplane.CreateRequest) { c.Resources.DiskMiB = 1 << 60 }, sandbox.ErrInvalid},
		"an empty template name": {func(c *controlplane.CreateRequest) { c.Template = "" }, sandbox.ErrNotFound},
	} {
		req := controlplane.CreateRequest{Template: "base", Timeout: time.Minute}
		c.change(&req)
		if _, err := r.Create(t.Context(), team, req); !errors.Is(err, c.kind) {
			t.Errorf("%s: got %v, want %v", name, err, c.kind)
		}
	}
	if list, err := r.store.Sandboxes().List(t.Context(), store.Filter{}); err != nil || len(list) != 0 {
		t.Errorf("records of what was refused: %v, %v", list, err)
	}
}

func TestRacingOperationsWithAnUnreliableAgentEndClean(t *testing.T) {
	r := newRig(t).run()
	flaky := func() error {
		switch rand.IntN(8) {
		case 0:
			return connect.NewError(connect.CodeUnavailable, errors.New("flaky"))
		case 1:
			return connect.NewError(connect.CodeInternal, errors.New("flaky"))
		}
		return nil
	}
	r.agent.SetHooks(
		func(context.Context, *hostagent.CreateSandboxRequest) error { return flaky() },
		func(context.Context, string) error { return flaky() },
	)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 12 {
				ctx, cancel := context.WithCancel(t.Context())
				if rand.IntN(4) == 0 {
					time.AfterFunc(time.Duration(rand.IntN(3000))*time.Microsecond, cancel)
				}
				b, err := r.Create(ctx, team, controlplane.CreateRequest{Template: "base", Timeout: time.Duration(1+rand.IntN(200)) * time.Millisecond})
				cancel()
				if err != nil {
					continue
				}
				switch rand.IntN(4) {
				case 0:
					r.agent.End(b.ID, "crashed")
				case 1:
					_, _, _ = r.Connect(t.Context(), team, b.ID, controlplane.ConnectRequest{Timeout: time.Duration(1+rand.IntN(100)) * time.Millisecond})
				case 2:
					go func() { _ = r.Kill(context.WithoutCancel(ctx), team, b.ID) }()
					_ = r.Kill(t.Context(), team, b.ID)
				}
			}
		})
	}
	wg.Wait()
	r.agent.SetHooks(nil, nil)
	r.agent.SetDown(true) // an outage that ends makes it look at what was left undone
	r.agent.SetDown(false)
	list, err := r.store.Sandboxes().List(t.Context(), store.Filter{})
	if err != nil || len(list) == 0 {
		t.Fatal(len(list), err)
	}
	for _, b := range list {
		for end := time.Now().Add(patience); ; {
			if now := r.record(b.ID); now.State.Final() {
				break
			} else if time.Now().After(end) {
				t.Fatalf("sandbox %s stays %s (%s)", b.ID, now.State, now.Reason)
			}
			<-time.After(5 * time.Millisecond)
		}
		if _, err := r.Resolve(t.Context(), string(b.ID)); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("sandbox %s has ended and is resolved: %v", b.ID, err)
		}
	}
	r.nothingLives()
	t.Logf("%d creates", len(list))
}
