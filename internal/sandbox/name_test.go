package sandbox_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/wrenn/wrenn/internal/sandbox"
)

func TestNamesAreTakenApart(t *testing.T) {
	for in, want := range map[string][2]string{
		"base":              {"", "base"},
		"my-snap_1":         {"", "my-snap_1"},
		"My-Snap:V1.2":      {"", "my-snap:v1.2"},
		"team/snap":         {"team", "snap"},
		"team/snap:default": {"team", "snap"},
		"snap:default":      {"", "snap"},
		"snap:defaults":     {"", "snap:defaults"},
	} {
		team, name, err := sandbox.ParseName(in)
		if got := [2]string{team, name}; err != nil || got != want {
			t.Errorf("%q is %q, %v, want %q", in, got, err, want)
		}
	}
	for _, bad := range []string{
		"", ":", "/", ":v1", "/snap", "team/", "snap:", "a/b/c", "a:b:c", "a b", "a\x00", "ü", "a.b", "../etc", "a:b/c", "a%2Fb",
		strings.Repeat("a", 129),
	} {
		if team, name, err := sandbox.ParseName(bad); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q is %q of %q, %v, want an error of kind ErrInvalid", bad, name, team, err)
		}
	}
}
