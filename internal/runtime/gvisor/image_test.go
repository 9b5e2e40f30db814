package gvisor

import (
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/wrenn/wrenn/internal/sandbox"
)

func TestAFullDiskIsToldWithoutItsPath(t *testing.T) {
	dir := t.TempDir()
	err := checkFree(dir, math.MaxInt64)
	text, public := sandbox.Message(err)
	if !errors.Is(err, sandbox.ErrExhausted) || !public || strings.Contains(text, dir) || !strings.Contains(text, "disk is full") {
		t.Errorf("told: %q", text)
	}
	if !strings.Contains(err.Error(), dir) { // for the log
		t.Errorf("logged: %v", err)
	}
}
