package controlplane_test

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wrenn/wrenn/internal/controlplane"
	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

func (r *rig) resolve(id sandbox.ID) proxy.Target {
	r.t.Helper()
	target, err := r.Resolve(r.t.Context(), string(id))
	if err != nil {
		r.t.Fatal(err)
	}
	return target
}

func TestWhoMayReachASandboxOutlivesARestart(t *testing.T) {
	r := newRig(t)
	b, err := r.Create(t.Context(), team, controlplane.CreateRequest{
		Template: "base", Timeout: time.Hour, Secured: true, Protected: true, MaskRequestHost: "app.test:${PORT}",
	})
	if err != nil {
		t.Fatal(err)
	}
	public := r.create(time.Hour)
	before, beforePublic := r.resolve(b.ID), r.resolve(public.ID)
	if a := before.Access; !a.Protected || a.Token != r.TrafficToken(b.ID) || len(a.LinkKey) != 32 || a.MaskRequestHost != "app.test:${PORT}" {
		t.Errorf("a protected sandbox resolves to %+v", before)
	}
	if a := beforePublic.Access; a.Protected || a.MaskRequestHost != "" {
		t.Errorf("a public sandbox resolves to %+v", beforePublic)
	}
	link, _, err := r.PreviewLink(t.Context(), team, b.ID, 3000, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	r.fresh()
	for id, want := range map[sandbox.ID]proxy.Target{b.ID: before, public.ID: beforePublic} {
		if diff := cmp.Diff(want, r.resolve(id), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
			cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
			t.Errorf("after a restart (-before +after):\n%s", diff)
		}
	}
	again, expires, err := r.PreviewLink(t.Context(), team, b.ID, 3000, time.Hour)
	if err != nil || proxy.SignLink(before.Access.LinkKey, string(b.ID), 3000, expires) != again {
		t.Errorf("the link of a fresh control plane is %q (before %q), %v", again, link, err)
	}
}

func TestSecretsOfASandboxAreItsOwn(t *testing.T) {
	r := newRig(t)
	a, b := r.create(time.Hour), r.create(time.Hour)
	seen := map[string]string{}
	for _, id := range []sandbox.ID{a.ID, b.ID} {
		access := r.resolve(id).Access
		for what, secret := range map[string]string{
			"access token": r.AccessToken(id), "traffic token": r.TrafficToken(id), "link key": string(access.LinkKey),
		} {
			what += " of " + string(id)
			if other, found := seen[secret]; found || secret == "" {
				t.Errorf("%s is %s", what, other)
			}
			seen[secret] = what
		}
	}
}

func TestPreviewLinksAreForRunningSandboxesOfTheTeam(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Hour)
	began := time.Now()
	_, expires, err := r.PreviewLink(t.Context(), team, b.ID, 80, time.Second)
	if err != nil || expires.Nanosecond() != 0 || expires.Before(began.Add(time.Second)) || expires.After(time.Now().Add(2*time.Second)) {
		t.Errorf("a link of a second expires at %v, %v; asked at %v", expires, err, began)
	}
	for _, c := range []struct {
		team string
		id   sandbox.ID
		port int
		d    time.Duration
		kind error
	}{
		{"others", b.ID, 80, time.Hour, sandbox.ErrNotFound},
		{team, sandbox.NewID(), 80, time.Hour, sandbox.ErrNotFound},
		{team, b.ID, 0, time.Hour, sandbox.ErrInvalid},
		{team, b.ID, 65536, time.Hour, sandbox.ErrInvalid},
		{team, b.ID, proxy.AgentPort, time.Hour, sandbox.ErrInvalid},
		{team, b.ID, 80, 0, sandbox.ErrInvalid},
		{team, b.ID, 80, controlplane.MaxPreview + time.Second, sandbox.ErrInvalid},
	} {
		if link, _, err := r.PreviewLink(t.Context(), c.team, c.id, c.port, c.d); link != "" || !errors.Is(err, c.kind) {
			t.Errorf("%+v: got %q, %v", c, link, err)
		}
	}
	if err := r.Kill(t.Context(), team, b.ID); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.PreviewLink(t.Context(), team, b.ID, 80, time.Hour); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("of an ended sandbox: %v", err)
	}
}

func TestABadRequestForAccessMakesNoSandbox(t *testing.T) {
	r := newRig(t)
	for _, req := range []controlplane.CreateRequest{
		{Protected: true}, {Secured: true, MaskRequestHost: "http://x"}, {Secured: true, MaskRequestHost: "x\r\ny"},
	} {
		req.Template, req.Timeout = "base", time.Hour
		if _, err := r.Create(t.Context(), team, req); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%+v: %v", req, err)
		}
	}
	if list, err := r.List(t.Context(), team, store.Filter{}); err != nil || len(list) != 0 {
		t.Errorf("made %v, %v", list, err)
	}
}
