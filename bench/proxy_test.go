package bench

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// The figures of so short a run say nothing; that there are any does.
func TestProxyIsMeasuredBesideNginx(t *testing.T) {
	if _, err := exec.LookPath("nginx"); err != nil {
		if _, err := os.Stat("/usr/sbin/nginx"); err != nil {
			t.Skip("nginx is not here: apt-get install nginx-light")
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	report, err := Proxy(ctx, ProxyOptions{
		Serve: []string{os.Args[0], "proxy-serve"}, Round: 50 * time.Millisecond, Rounds: 1, Idle: 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	var rates, latencies, memory int
	for _, r := range report.Results {
		if r.N == 0 || (r.Unit == "requests/s" || r.Unit == "MiB/s") && (r.P50 <= 0 || r.FloorP50 <= 0) {
			t.Errorf("%s: nothing was measured: %+v", r.Metric, r)
		}
		switch {
		case r.Unit == "requests/s" || r.Unit == "MiB/s":
			rates++
		case strings.HasPrefix(r.Metric, "added latency"):
			latencies++
		case strings.HasPrefix(r.Metric, "memory of an idle WebSocket"):
			memory++
		}
	}
	if rates != 6 || latencies != 3 || memory != 2 {
		t.Errorf("%d rates, %d latencies, %d kinds of WebSockets: %+v", rates, latencies, memory, report.Results)
	}
}
