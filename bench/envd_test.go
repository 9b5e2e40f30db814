package bench

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestMain lets the test binary be the servers that benchmarks start.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 {
		for name, serve := range map[string]func(io.Reader, io.Writer, string) error{
			"envd-floor": ServeEnvdFloor, "proxy-serve": ServeProxy,
		} {
			if os.Args[1] != name {
				continue
			}
			if err := serve(os.Stdin, os.Stdout, os.Args[2]); err != nil {
				panic(err)
			}
			return
		}
	}
	os.Exit(m.Run())
}

// buildEnvd builds the guest agent of this tree, which need not be the one that
// is embedded.
func buildEnvd(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "envd")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "../cmd/envd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build envd: %v\n%s", err, out)
	}
	return path
}

func smallEnvdOptions(t *testing.T) EnvdOptions {
	return EnvdOptions{
		Dir: t.TempDir(), Floor: []string{os.Args[0], "envd-floor"}, Binary: buildEnvd(t),
		Samples: 5, SizeMiB: 16, Transfers: 2, StreamMiB: 16, Settle: time.Second,
	}
}

func TestEnvdReportsEveryMetricBesideItsFloor(t *testing.T) {
	o := smallEnvdOptions(t)
	t.Chdir(o.Dir)
	o.Dir = "."
	report, err := Envd(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	var table bytes.Buffer
	if err := report.WriteTable(&table); err != nil {
		t.Fatal(err)
	}
	t.Log("\n" + table.String())
	if err := report.WriteJSON(io.Discard); err != nil {
		t.Fatalf("not a report that can be printed: %v", err)
	}
	found := map[string]Result{}
	for _, r := range report.Results {
		if r.N < 1 || r.P50 <= 0 || r.P50 > r.P99 {
			t.Errorf("%s: %d samples, p50 %v, p99 %v", r.Metric, r.N, r.P50, r.P99)
		}
		found[r.Metric] = r
	}
	for _, want := range []struct {
		metric      string
		floor, goal bool
	}{
		{"start to first answer", true, false},
		{"binary", false, true},
		{"idle RSS", false, true},
		{"idle threads", false, false},
		{"idle descriptors", false, false},
		{"exec of /bin/true", true, true},
		{"floor: fork, exec, wait", false, false},
		{"floor: HTTP round trip", false, false},
		{"RSS after exec", false, false},
		{"terminal echo", true, true},
		{"floor: bare pty echo", false, false},
		{"floor: HTTP round trip beside echo", false, false},
		{"upload", true, true},
		{"upload, floor synced", true, false},
		{"upload, multipart", true, false},
		{"download", true, true},
		{"output", true, false},
		{"output intact, reader sleeps", false, true},
		{"RSS after everything", false, false},
		{"idle RSS after everything", false, true},
	} {
		got, ok := found[want.metric]
		if !ok {
			t.Errorf("no %q", want.metric)
			continue
		}
		delete(found, want.metric)
		if (got.FloorP50 > 0) != want.floor || (got.Ratio > 0) != want.floor {
			t.Errorf("%s: floor %v, ratio %v; want one: %v", want.metric, got.FloorP50, got.Ratio, want.floor)
		}
		if (got.OK != nil) != want.goal {
			t.Errorf("%s: goal %q; want one: %v", want.metric, got.Goal, want.goal)
		}
	}
	for metric := range found {
		t.Errorf("%q is not expected", metric)
	}
	if left, err := os.ReadDir(o.Dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestEnvdOutputArrivesByteExactWhileTheReaderSleeps(t *testing.T) {
	b := runningEnvd(t)
	if err := b.measureStream(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, r := range b.results {
		if r.Metric == "output intact, reader sleeps" && (r.OK == nil || !*r.OK || r.P50 != float64(b.StreamMiB)) {
			t.Errorf("%+v", r)
		}
	}
}

// runningEnvd is a benchmark whose agent and floor run.
func runningEnvd(t *testing.T) *envdBench {
	t.Helper()
	b := &envdBench{EnvdOptions: smallEnvdOptions(t)}
	b.dir = b.Dir
	var err error
	if b.floor, err = startEnvdFloor(t.Context(), b.Floor, b.dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.floor.cancel(); <-b.floor.ended })
	if b.agent, _, err = startEnvd(t.Context(), b.Binary, b.dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.agent.cancel(); <-b.agent.ended })
	return b
}

func TestABadSampleFailsTheBenchmark(t *testing.T) {
	b := runningEnvd(t)
	if err := b.agent.wire.init(t.Context(), "token"); err != nil {
		t.Fatal(err)
	}
	b.agent.wire.token = "other"
	if _, err := b.exec(t.Context()); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("exec without the token: %v", err)
	}
	b.agent.wire.token = "token"
	s, err := b.agent.wire.start(t.Context(), command(b.dir, "/bin/false"))
	if err != nil {
		t.Fatal(err)
	}
	for {
		ev, err := s.next()
		if err != nil {
			t.Fatal(err)
		}
		if ev.End != nil {
			if err := s.end(ev); err == nil || !strings.Contains(err.Error(), "exit status 1") {
				t.Errorf("a program that fails: %v", err)
			}
			break
		}
	}
	path := filepath.Join(b.dir, "short")
	if err := os.WriteFile(path, pattern[:1000], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.download(t.Context(), path, 1001); err == nil || !strings.Contains(err.Error(), "1000 bytes came") {
		t.Errorf("a file that is too short: %v", err)
	}
	if err := os.WriteFile(path, append(bytes.Clone(pattern[:1000]), ^pattern[1000]), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.download(t.Context(), path, 1001); err == nil || !strings.Contains(err.Error(), "content is wrong") {
		t.Errorf("a file with a wrong byte: %v", err)
	}
	if got, err := b.streamOutput(t.Context(), "printf 'y\\ny\\nn\\n'", nil); err == nil || got != 0 {
		t.Errorf("output that is wrong: %d, %v", got, err)
	}
	dials := b.dials()
	b.agent.wire.http.CloseIdleConnections()
	if _, err := b.exec(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.warm(dials); err == nil {
		t.Error("a connection was made for a sample, and it counts as warm")
	}
}

func TestAnAgentThatDiesFailsTheBenchmark(t *testing.T) {
	b := runningEnvd(t)
	if err := b.agent.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-b.agent.ended:
	case <-time.After(10 * time.Second):
		t.Fatal("still there")
	}
	if _, err := b.exec(t.Context()); err == nil {
		t.Error("exec works without an agent")
	}
	if err := b.agent.stop(); err == nil || !strings.Contains(err.Error(), "ended by itself") {
		t.Errorf("stop: %v", err)
	}
	if _, _, err := startEnvd(t.Context(), "/bin/false", b.dir); err == nil || !strings.Contains(err.Error(), "ended before it answered") {
		t.Errorf("an agent that does not start: %v", err)
	}
}

func TestCheckerWantsThePatternAtEveryOffset(t *testing.T) {
	c := &checker{block: []byte("abc")}
	for _, part := range []string{"a", "bcab", "", "cabcabc"} {
		if n, err := c.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatalf("write %q: %d, %v", part, n, err)
		}
	}
	if err := c.want(12); err != nil {
		t.Error(err)
	}
	if _, err := c.Write([]byte("abb")); err == nil {
		t.Error("wrong content is taken")
	}
}
