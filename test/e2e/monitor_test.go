package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// scrape gets the platform's metrics as Prometheus does.
func (p *platform) scrape() map[string]*dto.MetricFamily {
	p.t.Helper()
	req, err := http.NewRequest("GET", p.url+"/metrics", nil)
	if err != nil {
		p.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+p.key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 200 {
		p.t.Fatalf("GET /metrics: %s", resp.Status)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(resp.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return families
}

// value sums what a counter or gauge has where the labels, given in pairs, are these.
func value(f *dto.MetricFamily, labels ...string) (sum float64) {
	for _, m := range f.GetMetric() {
		has := map[string]string{}
		for _, l := range m.GetLabel() {
			has[l.GetName()] = l.GetValue()
		}
		fits := true
		for i := 0; i < len(labels); i += 2 {
			fits = fits && has[labels[i]] == labels[i+1]
		}
		if fits {
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return sum
}

// webServer starts a server in the sandbox that says its word at /metrics.
func (b *box) webServer(port int, word string) {
	b.p.t.Helper()
	b.run(fmt.Sprintf("mkdir -p /root/www && printf %%s %s > /root/www/metrics", word))
	b.background(fmt.Sprintf("exec python3 -m http.server %d -d /root/www", port), false)
	eventually(b.p.t, 15*time.Second, "web server in "+b.id, func() error {
		if status, body := b.fetch(port, "/metrics"); status != 200 || body != word {
			return fmt.Errorf("%d %q", status, body)
		}
		return nil
	})
}

func TestMetricsOfARunningPlatform(t *testing.T) {
	p := startPlatform(t)
	b := p.create(nil)
	b.webServer(8000, "the-sandboxs-own") // through the sandbox's host comes what is there
	for range 20 {
		b.fetch(8000, "/metrics")
	}
	b.fetch(8000, "/none")

	var m map[string]*dto.MetricFamily
	eventually(t, 5*time.Second, "the lines of the access log are written and counted", func() error {
		m = p.scrape()
		if n := value(m["wrenn_access_log_lines_total"]); n < 21 {
			return fmt.Errorf("%v lines", n)
		}
		return nil
	})
	for _, name := range []string{"go_goroutines", "process_resident_memory_bytes"} {
		if value(m[name]) <= 0 {
			t.Errorf("%s is %v", name, value(m[name]))
		}
	}
	of := func(labels ...string) []string { return append([]string{"sandbox", b.id}, labels...) }
	if n := value(m["wrenn_proxy_requests_total"], of("port", "8000", "code", "2xx")...); n < 20 {
		t.Errorf("%v requests with an answer", n)
	}
	if n := value(m["wrenn_proxy_requests_total"], of("port", "8000", "code", "4xx")...); n != 1 {
		t.Errorf("%v requests for what there is not", n)
	}
	if n := value(m["wrenn_proxy_sent_bytes_total"], of("port", "8000")...); n < 20*float64(len("the-sandboxs-own")) {
		t.Errorf("%v bytes", n)
	}
	if n := value(m["wrenn_proxy_answer_seconds"], of("port", "8000")...); n < 21 {
		t.Errorf("%v answers", n)
	}
	if n := value(m["wrenn_proxy_open_streams"], of("port", "49983")...); n < 1 { // that of the web server's output
		t.Errorf("%v streams to the guest agent", n)
	}

	b.kill()
	eventually(t, 10*time.Second, "the sandbox's metrics are gone", func() error {
		after := p.scrape()
		if n := value(after["wrenn_proxy_requests_total"], of()...); n != 0 {
			return fmt.Errorf("%v requests", n)
		}
		if n := value(after["wrenn_proxy_all_requests_total"]); n < value(m["wrenn_proxy_all_requests_total"]) {
			t.Fatalf("%v requests of all", n)
		}
		return nil
	})

	resp, err := http.Get(p.url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	var failure struct{ Code int }
	if resp.StatusCode != 401 || json.Unmarshal(body, &failure) != nil || failure.Code != 401 {
		t.Errorf("without a key: %s %s", resp.Status, body)
	}
}

// accessLine is a line of the access log.
type accessLine struct {
	Sandbox, Method, Path string
	Port, Status          int
	Sent                  int64
}

// accessLog reads the access log's files, the older first. Every line must be whole.
func accessLog(t *testing.T, path string) (lines []accessLine) {
	t.Helper()
	for _, name := range []string{path + ".1", path} {
		text, err := os.ReadFile(name)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for _, line := range bytes.SplitAfter(text, []byte{'\n'}) {
			if len(line) == 0 {
				continue
			}
			var l accessLine
			if !bytes.HasSuffix(line, []byte{'\n'}) || json.Unmarshal(line, &l) != nil {
				t.Fatalf("%s has a broken line: %q", name, line)
			}
			lines = append(lines, l)
		}
	}
	return lines
}

func TestAccessLogIsWholeAfterTheKillOfAPlatform(t *testing.T) {
	p := startPlatform(t)
	path := filepath.Join(p.dir, "log", "access.log")
	b := p.create(nil)
	b.webServer(8000, "word")
	for range 2 {
		stop := make(chan struct{})
		var load sync.WaitGroup
		for range 4 {
			load.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						b.fetch(8000, "/metrics?token=secret")
					}
				}
			})
		}
		before := len(accessLog(t, path))
		eventually(t, 10*time.Second, "lines are written", func() error {
			text, _ := os.ReadFile(path)
			if n := bytes.Count(text, []byte{'\n'}); n < before+50 {
				return fmt.Errorf("%d lines", n)
			}
			return nil
		})
		p.end(syscall.SIGKILL)
		close(stop)
		load.Wait()
		p.start()
	}
	b.fetch(8000, "/last")
	p.end(syscall.SIGTERM) // writes what is left
	lines := accessLog(t, path)
	last := lines[len(lines)-1]
	if want := (accessLine{Sandbox: b.id, Port: 8000, Method: "GET", Path: "/last", Status: 404, Sent: last.Sent}); last != want || last.Sent == 0 {
		t.Errorf("last line: %+v", last)
	}
	if text, _ := os.ReadFile(path); strings.Contains(string(text), "secret") {
		t.Error("the log has a query in it")
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestAccessLogGoesWhereItIsTold(t *testing.T) {
	elsewhere := filepath.Join(t.TempDir(), "requests.jsonl")
	for flag, check := range map[string]func(p *platform) error{
		elsewhere: func(*platform) error {
			if len(accessLog(t, elsewhere)) == 0 {
				return errors.New("no line")
			}
			return nil
		},
		"-": func(p *platform) error { // standard output is the platform's log here
			if log := p.logTail(); !strings.Contains(log, `"path":"/metrics"`) {
				return errors.New("no line")
			}
			return nil
		},
		"off": func(p *platform) error {
			if _, err := os.Stat(filepath.Join(p.dir, "log", "access.log")); !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("there is an access log: %v", err)
			}
			return nil
		},
	} {
		t.Run(flag, func(t *testing.T) {
			p := startPlatform(t, "--access-log", flag)
			p.create(nil).fetch(8000, "/metrics")
			eventually(t, 5*time.Second, "line in the access log", func() error { return check(p) })
		})
	}
	t.Run("a bad place is said to be one", func(t *testing.T) {
		p := newPlatform(t)
		out, err := exec.Command(suite.bin, "up", "--data", p.dir, "--listen", p.listen, "--access-log", "/proc/none/log").CombinedOutput()
		if err == nil || !strings.Contains(string(out), "--access-log") {
			t.Errorf("%v: %s", err, out)
		}
	})
}
