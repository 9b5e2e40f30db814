package kvm

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestVerdictsAreKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), "kvm.json")
	tries := 0
	decide := func(monitor string, result error) Verdict {
		t.Helper()
		v, err := Decide(t.Context(), file, monitor, "kernel", func(context.Context) error { tries++; return result })
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	want := func(n int) {
		t.Helper()
		if tries != n {
			t.Errorf("tried %d times, want %d", tries, n)
		}
	}
	if v := decide("a", errors.New("busy")); v.Refusal != "busy" {
		t.Errorf("the verdict is %+v", v)
	}
	if v := decide("a", nil); v.Refusal != "busy" {
		t.Errorf("the verdict is %+v", v)
	}
	want(1)
	// Another monitor is another matter.
	if v := decide("b", errors.New("no")); v.Refusal != "no" {
		t.Errorf("the verdict is %+v", v)
	}
	want(2)
	// A refusal is asked for again after a while, and what ran is not.
	change := func(f func(*Verdict)) {
		v, err := Read(file)
		if err != nil {
			t.Fatal(err)
		}
		f(&v)
		data, err := json.Marshal(v)
		if err == nil {
			err = os.WriteFile(file, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	change(func(v *Verdict) { v.Time = v.Time.Add(-refusalHolds) })
	if v := decide("b", nil); v.Refusal != "" {
		t.Errorf("the verdict is %+v", v)
	}
	want(3)
	change(func(v *Verdict) { v.Time = v.Time.Add(-1000 * time.Hour) })
	decide("b", errors.New("no"))
	want(3)
	change(func(v *Verdict) { v.Boot = "another" })
	if _, err := Read(file); err == nil {
		t.Error("the verdict of an earlier boot is one of this")
	}
	decide("b", nil)
	want(4)
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	decide("b", nil)
	want(5)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Decide(ctx, file, "c", "kernel", func(context.Context) error { return ctx.Err() }); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
	if v, err := Read(file); err != nil || v.Monitor != "b" {
		t.Errorf("what was interrupted is kept: %+v (%v)", v, err)
	}
}
