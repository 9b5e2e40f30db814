package e2e

import (
	"bytes"
	"encoding/json"
	"testing"
	"time"
)

// The figures of a busy machine say nothing, so no goal is judged here: only that
// keys were typed and that what they were typed beside was there.
func TestBenchTerminalTypesBesideARealLoad(t *testing.T) {
	p := startPlatform(t)
	cmd := p.command("bench", "terminal", "--json", "-n", "20", "--rounds", "1")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	timer := time.AfterFunc(4*time.Minute, func() { cmd.Process.Kill() })
	defer timer.Stop()
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	type metric struct {
		Metric, Unit, Goal, Note string
		N                        int
		P50, P95, P99            float64
		FloorP50                 float64 `json:"floor_p50"`
		OK                       *bool
	}
	var report struct {
		Bench   string
		Host    struct{ CPUs int }
		Results []metric
	}
	if err := json.Unmarshal(stdout.Bytes(), &report); err != nil {
		t.Fatalf("%v: %s", err, &stdout)
	}
	if report.Bench != "terminal" || report.Host.CPUs < 1 {
		t.Errorf("report of %q on %d processors", report.Bench, report.Host.CPUs)
	}
	found := map[string]metric{}
	for _, r := range report.Results {
		found[r.Metric] = r
	}
	for _, want := range []struct {
		metric, unit string
		least        float64 // of the median
		floor, goal  bool
	}{
		{"keystroke, idle", "ms", .01, false, false},
		{"keystroke, 50 stalled downloads", "ms", .01, true, true},
		{"keystroke, full load", "ms", .01, true, true},
		{"CPU, full load", "%", 1, false, true},
		{"load: stalled downloads", "downloads", 40, false, true},
		{"load: messages", "1/s", 40, false, true},
		{"load: polls", "1/s", 10, false, true},
		{"load: downloads", "MiB/s", .1, false, false},
		{"load: uploads", "MiB/s", .01, false, false},
		{"shared HTTP/2: keystroke, idle", "ms", .01, false, false},
		{"shared HTTP/2: keystroke, 50 stalled downloads", "ms", .01, true, false},
		{"shared HTTP/2: keystroke, full load", "ms", .01, true, false},
		{"shared HTTP/2: CPU, full load", "%", 1, false, true},
		{"shared HTTP/2: load: stalled downloads", "downloads", 0, false, false},
		{"shared HTTP/2: load: messages", "1/s", 0, false, false},
		{"shared HTTP/2: load: polls", "1/s", 0, false, false},
		{"shared HTTP/2: load: downloads", "MiB/s", 0, false, false},
		{"shared HTTP/2: load: uploads", "MiB/s", 0, false, false},
		{"shared HTTP/2, 64 KiB: keystroke, idle", "ms", .01, false, false},
		{"shared HTTP/2, 64 KiB: keystroke, 50 stalled downloads", "ms", .01, true, false},
		{"shared HTTP/2, 64 KiB: load: stalled downloads", "downloads", 0, false, false},
	} {
		got, ok := found[want.metric]
		if !ok {
			t.Errorf("no %q", want.metric)
			continue
		}
		delete(found, want.metric)
		if got.Unit != want.unit || got.N < 1 || got.P50 < want.least || got.P50 > got.P95 || got.P95 > got.P99 {
			t.Errorf("%+v, want at least %v %s", got, want.least, want.unit)
		}
		if (got.FloorP50 > 0) != want.floor || (got.OK != nil) != want.goal || (got.Goal != "") != want.goal {
			t.Errorf("%+v, want a floor: %v, a goal: %v", got, want.floor, want.goal)
		}
	}
	for name := range found {
		t.Errorf("%q is not expected", name)
	}
	if got := p.running(); len(got) > 0 {
		t.Errorf("sandboxes are left: %v", got)
	}
}
