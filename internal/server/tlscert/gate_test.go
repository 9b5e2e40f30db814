package tlscert

import (
	"context"
	"errors"
	"fmt"
	"testing"
)

const boxID = "abcdefghij0123456789"

func newGate() *gate {
	return &gate{host: "boxes.test", exists: func(_ context.Context, id string) error {
		if id != boxID {
			return errors.New("not found")
		}
		return nil
	}}
}

func name(port int) string { return fmt.Sprintf("%d-%s.boxes.test", port, boxID) }

func TestOneSandboxGetsSoManyCertificatesAndNoMore(t *testing.T) {
	g := newGate()
	for range 2 { // those it has it keeps
		for port := 1; port <= certificatesPerSandbox; port++ {
			if err := g.admit(t.Context(), name(port)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := g.admit(t.Context(), name(8080)); err == nil {
		t.Error("another one")
	}
	// Legacy names are names like others.
	if err := g.admit(t.Context(), "1-"+boxID+"-a1.boxes.test"); err == nil {
		t.Error("another one, by a third part of the name")
	}
}

func TestAfterAFailureThereIsAPause(t *testing.T) {
	g := newGate()
	if err := g.admit(t.Context(), name(1)); err != nil {
		t.Fatal(err)
	}
	g.failed(name(1))
	if err := g.admit(t.Context(), name(1)); err == nil {
		t.Error("asked again at once")
	}
	if err := g.admit(t.Context(), name(2)); err != nil {
		t.Errorf("another name: %v", err)
	}
	g.admitted[boxID][name(1)] = g.admitted[boxID][name(1)].Add(-pauseAfterFailure)
	if err := g.admit(t.Context(), name(1)); err != nil {
		t.Errorf("after the pause: %v", err)
	}
	g.failed("nobodys.boxes.test") // is nothing to it
}

func TestOnlyHostsOfSandboxesThatExistAreAdmitted(t *testing.T) {
	g := newGate()
	for _, n := range []string{
		"", "boxes.test", ".boxes.test", "api.boxes.test", "3000.boxes.test", "3000-.boxes.test", "3000-" + boxID + ".other.test",
		"3000-zzzzzzzzzzzzzzzzzzzz.boxes.test", "03000-" + boxID + ".boxes.test", "65536-" + boxID + ".boxes.test",
		"99999999999999999999999-" + boxID + ".boxes.test", "-" + boxID + ".boxes.test", "3000-" + boxID + "-a-b.boxes.test",
		"a.3000-" + boxID + ".boxes.test", "*.boxes.test",
	} {
		if err := g.admit(t.Context(), n); err == nil {
			t.Errorf("admitted %q", n)
		}
	}
	for _, n := range []string{name(1), name(65535), "3000-" + boxID + "-legacy1.boxes.test"} {
		if err := g.admit(t.Context(), n); err != nil {
			t.Errorf("%q: %v", n, err)
		}
	}
	if len(g.admitted) != 1 {
		t.Errorf("counts %v", g.admitted)
	}
}

func TestTheCountIsBounded(t *testing.T) {
	g := newGate()
	g.exists = func(context.Context, string) error { return nil }
	for i := range sandboxesCounted + 10 {
		if err := g.admit(t.Context(), fmt.Sprintf("1-%020d.boxes.test", i)); err != nil {
			t.Fatal(err)
		}
	}
	if len(g.admitted) > sandboxesCounted {
		t.Errorf("counts %d sandboxes", len(g.admitted))
	}
}
