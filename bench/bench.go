// Package bench measures a running platform, each figure beside a floor taken
// in the same run: machines are small and noisy, so a time alone says little.
// `wrenn bench NAME` prints what Report holds.
package bench

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// Report is the outcome of one benchmark, as --json prints it.
type Report struct {
	Bench   string   `json:"bench"`
	Host    Host     `json:"host"`
	Results []Result `json:"results"`
}

// Host is the machine a report comes from.
type Host struct {
	CPUs      int    `json:"cpus"`
	MemoryMiB int64  `json:"memory_mib"`
	Kernel    string `json:"kernel"`
	Runtime   string `json:"runtime"`
}

// Result is one metric. Ratio is P50 over FloorP50; both are zero where there is
// no floor. OK says whether this run met Goal, and is nil where there is none.
type Result struct {
	Metric   string  `json:"metric"`
	Unit     string  `json:"unit"`
	N        int     `json:"n"`
	P50      float64 `json:"p50"`
	P95      float64 `json:"p95"`
	P99      float64 `json:"p99"`
	FloorP50 float64 `json:"floor_p50,omitempty"`
	Ratio    float64 `json:"ratio,omitempty"`
	Goal     string  `json:"goal,omitempty"`
	OK       *bool   `json:"ok,omitempty"`
	Note     string  `json:"note,omitempty"`
}

// samples are measurements of one metric.
type samples []float64

func (s *samples) addMillis(d time.Duration) { *s = append(*s, float64(d)/1e6) }

// quantile is the nearest-rank quantile, 0 < q ≤ 1.
func (s samples) quantile(q float64) float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	sorted := slices.Clone(s)
	slices.Sort(sorted)
	rank := int(math.Ceil(q*float64(len(sorted)))) - 1
	return sorted[min(max(rank, 0), len(sorted)-1)]
}

func (s samples) result(metric, unit string) Result {
	return Result{
		Metric: metric, Unit: unit, N: len(s),
		P50: round(s.quantile(.5)), P95: round(s.quantile(.95)), P99: round(s.quantile(.99)),
	}
}

// against sets the floor of r, and the highest ratio to it that is good enough.
func (r Result) against(floor samples, atMost float64) Result {
	r.FloorP50 = round(floor.quantile(.5))
	r.Ratio = round(r.P50 / r.FloorP50)
	r.Goal = "ratio ≤ " + strconv.FormatFloat(atMost, 'g', -1, 64)
	ok := r.Ratio <= atMost
	r.OK = &ok
	return r
}

// want sets a goal that is not a ratio.
func (r Result) want(goal string, ok bool) Result {
	r.Goal, r.OK = goal, &ok
	return r
}

func (r Result) noted(format string, args ...any) Result {
	r.Note = fmt.Sprintf(format, args...)
	return r
}

// single is a metric that was measured once.
func single(metric, unit string, v float64) Result { return samples{v}.result(metric, unit) }

func round(v float64) float64 { return math.Round(v*1000) / 1000 }

// thisHost describes the machine.
func thisHost(runtimeName string) Host {
	h := Host{CPUs: runtime.NumCPU(), Runtime: runtimeName}
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) == nil {
		h.MemoryMiB = int64(si.Totalram) * int64(si.Unit) >> 20
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h.Kernel = string(bytes.TrimRight(u.Release[:], "\x00"))
	}
	return h
}

// WriteJSON prints the report as one object.
func (r Report) WriteJSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(r)
}

// WriteTable prints the report for people.
func (r Report) WriteTable(w io.Writer) error {
	fmt.Fprintf(w, "%s on %d CPUs, %d MiB, Linux %s, %s\n", r.Bench, r.Host.CPUs, r.Host.MemoryMiB, r.Host.Kernel, r.Host.Runtime)
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "metric\tunit\tn\tp50\tp95\tp99\tfloor p50\tratio\tgoal\tok\tnote")
	for _, v := range r.Results {
		floor, ratio, ok := "", "", ""
		if v.FloorP50 != 0 {
			floor, ratio = fmt.Sprint(v.FloorP50), fmt.Sprint(v.Ratio)
		}
		if v.OK != nil {
			ok = map[bool]string{true: "yes", false: "no"}[*v.OK]
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%v\t%v\t%v\t%s\t%s\t%s\t%s\t%s\n",
			v.Metric, v.Unit, v.N, v.P50, v.P95, v.P99, floor, ratio, v.Goal, ok, v.Note)
	}
	return t.Flush()
}

// progress tells a person who waits how far a benchmark is.
func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
