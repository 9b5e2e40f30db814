package controlplane_test

import (
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

func TestARecordFollowsWhatTheAgentHas(t *testing.T) {
	r := newRig(t).run()
	b := r.create(time.Hour)
	reconnect := func() {
		r.agent.SetDown(true)
		r.agent.SetDown(false)
		r.agent.AwaitWatcher()
	}

	r.agent.Put(b.ID, sandbox.Paused, "")
	reconnect()
	r.await(b.ID, sandbox.Paused)
	_, err := r.Resolve(t.Context(), string(b.ID))
	is(t, err, sandbox.ErrNotFound)

	r.agent.Put(b.ID, sandbox.Running, "")
	reconnect()
	r.await(b.ID, sandbox.Running)
	target, err := r.Resolve(t.Context(), string(b.ID))
	if err != nil || target.Addr.String() != "10.0.0.9" {
		t.Errorf("it is reached at %v, %v", target.Addr, err)
	}
}
