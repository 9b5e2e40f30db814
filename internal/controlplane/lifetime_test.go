package controlplane_test

import (
	"context"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/controlplane"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

func TestASandboxEndsWhenItsTimeIsOver(t *testing.T) {
	r := newRig(t).run()
	b := r.create(150 * time.Millisecond)
	b = r.await(b.ID, sandbox.Stopped)
	if late := b.Ended.Sub(b.Ends); late < 0 || late > 2*time.Second {
		t.Errorf("it ended %v after its time", late)
	}
	contains(t, b.Reason, "timeout")
	r.nothingLives()
}

func TestEachSandboxEndsAtItsOwnTime(t *testing.T) {
	r := newRig(t).run()
	long := r.create(time.Hour)
	short := r.create(100 * time.Millisecond) // must wake the sleep for the long one
	middle := r.create(time.Hour)
	r.await(short.ID, sandbox.Stopped)
	if err := r.SetTimeout(t.Context(), team, middle.ID, 50*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	r.await(middle.ID, sandbox.Stopped)
	if err := r.SetTimeout(t.Context(), team, long.ID, 0); err != nil {
		t.Fatal(err)
	}
	r.await(long.ID, sandbox.Stopped)
}

func TestAnExtendedSandboxOutlivesItsFirstEnd(t *testing.T) {
	r := newRig(t).run()
	a, b := r.create(200*time.Millisecond), r.create(200*time.Millisecond)
	if _, _, err := r.Connect(t.Context(), team, a.ID, controlplane.ConnectRequest{Timeout: time.Hour}); err != nil {
		t.Fatal(err)
	}
	r.await(b.ID, sandbox.Stopped) // the first end has passed
	if now := r.record(a.ID); now.State != sandbox.Running {
		t.Errorf("state is %s: %s", now.State, now.Reason)
	}
}

// hookedBoxes are a store's sandboxes with a word before every transition.
type hookedBoxes struct {
	store.Sandboxes
	before func(store.Change)
}

func (b hookedBoxes) Transition(ctx context.Context, id sandbox.ID, from sandbox.State, c store.Change) error {
	b.before(c)
	return b.Sandboxes.Transition(ctx, id, from, c)
}

type hookedStore struct {
	store.Store
	before func(store.Change)
}

func (s hookedStore) Sandboxes() store.Sandboxes {
	return hookedBoxes{s.Store.Sandboxes(), s.before}
}

func TestAKillDoesNotShareTheFateOfAnExpiryThatIsPutOff(t *testing.T) {
	r := newRig(t)
	expiring, proceed := make(chan struct{}), make(chan struct{})
	r.store = hookedStore{r.store, func(c store.Change) {
		if !c.IfEndsBy.IsZero() {
			close(expiring)
			<-proceed
		}
	}}
	r.fresh()
	r.run()
	b := r.create(50 * time.Millisecond)
	<-expiring
	if err := r.SetTimeout(t.Context(), team, b.ID, time.Hour); err != nil {
		t.Fatal(err)
	}
	killed := make(chan error, 1)
	go func() { killed <- r.Kill(t.Context(), team, b.ID) }()
	select {
	case err := <-killed:
		t.Fatalf("the kill did not wait for the expiry: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(proceed)
	if err := <-killed; err != nil {
		t.Error(err)
	}
	r.nothingLives()
	r.await(b.ID, sandbox.Stopped)
}

func TestConnectAndRefreshOnlyExtend(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Hour)
	got, _, err := r.Connect(t.Context(), team, b.ID, controlplane.ConnectRequest{Timeout: time.Minute})
	if err != nil || !got.Ends.Equal(b.Ends.UTC()) {
		t.Errorf("connect moved the end from %v to %v, %v", b.Ends, got.Ends, err)
	}
	if err := r.Refresh(t.Context(), team, b.ID, 2*time.Hour); err != nil {
		t.Error(err)
	}
	if d := time.Until(r.record(b.ID).Ends); d < time.Hour+59*time.Minute {
		t.Errorf("it lives for %v", d)
	}
	is(t, r.Refresh(t.Context(), team, b.ID, 0), sandbox.ErrInvalid)
	is(t, r.Refresh(t.Context(), team, b.ID, 25*time.Hour), sandbox.ErrInvalid)
	is(t, r.SetTimeout(t.Context(), team, b.ID, -time.Second), sandbox.ErrInvalid)
	is(t, r.SetTimeout(t.Context(), team, b.ID, 25*time.Hour), sandbox.ErrInvalid)
	is(t, r.SetTimeout(t.Context(), team, sandbox.NewID(), time.Second), sandbox.ErrNotFound)
}

func TestASandboxThatEndsByItselfSaysWhy(t *testing.T) {
	r := newRig(t).run()
	b := r.create(time.Hour)
	r.agent.Log(b.ID, "info", "hello")
	r.agent.End(b.ID, "out of memory: it used more than 512 MiB")
	r.await(b.ID, sandbox.Failed)
	if id := <-r.gone; id != string(b.ID) {
		t.Errorf("told that %s is gone", id)
	}
	_, err := r.Get(t.Context(), team, b.ID)
	is(t, err, sandbox.ErrNotFound)
	contains(t, err.Error(), "out of memory: it used more than 512 MiB")
	logs, err := r.Logs(t.Context(), team, b.ID, time.Time{})
	if err != nil || len(logs) != 2 {
		t.Fatalf("logs: %v, %v", logs, err)
	}
	contains(t, logs[0].Message, "hello")
	contains(t, logs[1].Message, "out of memory")
	is(t, r.Kill(t.Context(), team, b.ID), sandbox.ErrNotFound)
}

func TestACreateThatFailedDuringARestartIsNotTakenForAKill(t *testing.T) {
	r := newRig(t)
	b := sandbox.Sandbox{
		ID: sandbox.NewID(), TeamID: team, HostID: "h1", State: sandbox.Stopping,
		Created: time.Now(), Reason: "create failed: its creator went away while it was being created",
	}
	if err := r.store.Sandboxes().Insert(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	r.run()
	r.await(b.ID, sandbox.Failed)
}

func TestARestartMakesRecordsAndAgentAgree(t *testing.T) {
	r := newRig(t)
	insert := func(state sandbox.State) sandbox.ID {
		b := sandbox.Sandbox{
			ID: sandbox.NewID(), TeamID: team, HostID: "h1", State: state, Address: "10.0.0.9",
			Created: time.Now(), Ends: time.Now().Add(time.Hour), Spec: sandbox.Spec{Secured: true},
		}
		if state == sandbox.Stopping {
			b.Reason = "it was killed"
		}
		if err := r.store.Sandboxes().Insert(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		return b.ID
	}
	cases := []struct {
		name    string
		record  sandbox.State // empty: none
		agent   sandbox.State // empty: not there
		reason  string        // the agent's
		want    sandbox.State
		because string
	}{
		{"a create cut off before the agent had it", sandbox.Starting, "", "", sandbox.Failed, "restarted"},
		{"a create cut off before it was recorded", sandbox.Starting, sandbox.Running, "", sandbox.Failed, "restarted"},
		{"an intent cut off", sandbox.Pending, "", "", sandbox.Failed, "restarted"},
		{"a kill cut off before the agent did it", sandbox.Stopping, sandbox.Running, "", sandbox.Stopped, "killed"},
		{"a kill cut off after the agent did it", sandbox.Stopping, "", "", sandbox.Stopped, "killed"},
		{"one that ended meanwhile", sandbox.Running, sandbox.Failed, "out of memory", sandbox.Failed, "out of memory"},
		{"one that the agent lost", sandbox.Running, "", "", sandbox.Failed, "lost"},
		{"one that just runs", sandbox.Running, sandbox.Running, "", sandbox.Running, ""},
	}
	ids := make([]sandbox.ID, len(cases))
	for i, c := range cases {
		ids[i] = insert(c.record)
		if c.agent != "" {
			r.agent.Put(ids[i], c.agent, c.reason)
		}
	}
	orphan := sandbox.NewID()
	r.agent.Put(orphan, sandbox.Running, "")
	orphanStopped := make(chan struct{})
	r.agent.SetHooks(nil, func(_ context.Context, id string) error {
		if id == string(orphan) {
			close(orphanStopped)
		}
		return nil
	})

	r.fresh()
	running := string(ids[len(ids)-1])
	if _, err := r.Resolve(t.Context(), running); err != nil {
		t.Errorf("a running sandbox is not found before the agent was asked: %v", err)
	}
	r.run()
	for i, c := range cases {
		b := r.await(ids[i], c.want)
		contains(t, b.Reason, c.because)
		if c.want.Final() && b.Ended.IsZero() {
			t.Errorf("%s: no time of its end", c.name)
		}
	}
	<-orphanStopped
	r.halt()
	if living := r.agent.Living(); len(living) != 1 || living[0] != running {
		t.Errorf("the agent has %v, want only %s", living, running)
	}
	if _, err := r.Resolve(t.Context(), running); err != nil {
		t.Error(err)
	}
	if id := sandbox.ID(running); r.agent.Token(id) != r.AccessToken(id) {
		t.Errorf("the agent was given the token %q", r.agent.Token(id))
	}
}

func TestAKillDuringAnOutageIsFinishedAfterIt(t *testing.T) {
	r := newRig(t).run()
	b := r.create(time.Hour)
	r.agent.SetDown(true)
	is(t, r.Kill(t.Context(), team, b.ID), sandbox.ErrUnavailable)
	if state := r.record(b.ID).State; state != sandbox.Stopping {
		t.Errorf("state is %s", state)
	}
	_, err := r.Resolve(t.Context(), string(b.ID))
	is(t, err, sandbox.ErrNotFound)
	_, err = r.Create(t.Context(), team, controlplane.CreateRequest{Template: "base", Timeout: time.Minute})
	is(t, err, sandbox.ErrUnavailable)
	r.agent.SetDown(false)
	contains(t, r.await(b.ID, sandbox.Stopped).Reason, "killed")
	r.nothingLives()
}

func TestWhatEndedDuringAnOutageIsSeenAfterIt(t *testing.T) {
	r := newRig(t).run()
	a, b := r.create(time.Hour), r.create(time.Hour)
	r.agent.SetDown(true)
	r.agent.Put(a.ID, sandbox.Failed, "its init exited")
	r.agent.Vanish(b.ID)
	r.agent.SetDown(false)
	contains(t, r.await(a.ID, sandbox.Failed).Reason, "init exited")
	contains(t, r.await(b.ID, sandbox.Failed).Reason, "lost")
}

func TestAnAPIKeyActsForItsTeamUntilItIsDeleted(t *testing.T) {
	r := newRig(t)
	got, err := r.Authenticate(t.Context(), "e2b_00ff")
	if err != nil || got.ID != team {
		t.Fatalf("%v, %v", got, err)
	}
	for _, key := range []string{"", "e2b_00fe", "E2B_00FF", "e2b_00ff ", "e2b_00ff\x00"} {
		_, err := r.Authenticate(t.Context(), key)
		is(t, err, sandbox.ErrUnauthenticated)
	}
	if _, err := r.Bootstrap(t.Context(), "e2b_00ff"); err != nil { // a second start
		t.Error(err)
	}
	keys, err := r.store.APIKeys().List(t.Context(), team)
	if err != nil || len(keys) != 1 {
		t.Fatal(keys, err)
	}
	if err := r.store.APIKeys().Delete(t.Context(), team, keys[0].ID); err != nil {
		t.Fatal(err)
	}
	r.fresh() // without what the old one had in memory
	_, err = r.Authenticate(t.Context(), "e2b_00ff")
	is(t, err, sandbox.ErrUnauthenticated)
}

func TestAccessTokensDependOnKeyAndSandbox(t *testing.T) {
	r := newRig(t)
	a, b := sandbox.NewID(), sandbox.NewID()
	other := controlplane.New(controlplane.Config{Store: r.store, Agent: r.agent.Client, MasterKey: []byte("other")})
	first, again := r.AccessToken(a), r.AccessToken(a)
	if len(first) != 64 || first != again ||
		r.AccessToken(a) == r.AccessToken(b) || r.AccessToken(a) == other.AccessToken(a) {
		t.Error("tokens are not what they should be")
	}
}

func TestMetricsAreThoseOfTheAgent(t *testing.T) {
	r := newRig(t)
	a, b := r.create(time.Hour), r.create(time.Hour)
	points, err := r.Metrics(t.Context(), team, a.ID, time.Unix(1_700_000_001, 0), time.Unix(1_700_000_009, 0))
	if err != nil || len(points) != 1 || points[0].MemUsed != 101 || points[0].CPUUsedPct != 12.5 {
		t.Errorf("%+v, %v", points, err)
	}
	latest, err := r.LatestMetrics(t.Context(), team, []sandbox.ID{a.ID, b.ID, sandbox.NewID()})
	if err != nil || len(latest) != 2 || latest[b.ID].MemUsed != 102 {
		t.Errorf("%+v, %v", latest, err)
	}
	if n, err := r.Count(t.Context(), team, store.Filter{}); err != nil || n != 2 {
		t.Errorf("%d, %v", n, err)
	}
}
