// Command testsummary reads the output of `go test -json`. With -live it prints
// a line per package and the output of failed tests as they come; without, a
// summary at the end: what failed, what was skipped and why, and the counts. It
// exits with 1 when something failed or nothing ran.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
)

// event is a line of `go test -json`; see `go doc test2json`.
type event struct {
	Action     string
	Package    string
	ImportPath string // of a package that does not build
	Test       string
	Elapsed    float64
	Output     string
}

type test struct{ pkg, name string }

type run struct {
	outcome map[test]string   // pass, fail or skip; the name is empty for a package
	output  map[test][]string // lines
	parent  map[test]bool     // has subtests: they count, not it
	order   []test
	stray   []string // what is not JSON: errors of the go command
	broken  []string // import paths of packages that do not build
}

func main() {
	live := flag.Bool("live", false, "print results as they come instead of a summary")
	flag.Parse()
	r := run{outcome: map[test]string{}, output: map[test][]string{}, parent: map[test]bool{}}
	if err := r.read(os.Stdin, *live); err != nil {
		fmt.Fprintln(os.Stderr, "testsummary:", err)
		os.Exit(1)
	}
	if !*live && !r.summarise(os.Stdout) {
		os.Exit(1)
	}
}

func (r *run) read(in io.Reader, live bool) error {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadString('\n')
		if line = strings.TrimSpace(line); line != "" {
			r.line(line, live)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read test results: %w", err)
		}
	}
}

func (r *run) line(line string, live bool) {
	var e event
	if json.Unmarshal([]byte(line), &e) != nil {
		r.stray = append(r.stray, line)
		if live {
			fmt.Println(line)
		}
		return
	}
	t := test{e.Package, e.Test}
	switch e.Action {
	case "output":
		r.output[t] = append(r.output[t], e.Output)
	case "build-output":
		if live {
			fmt.Print(e.Output)
		}
	case "build-fail":
		r.broken = append(r.broken, e.ImportPath)
	case "run":
		if i := strings.LastIndex(t.name, "/"); i > 0 {
			r.parent[test{t.pkg, t.name[:i]}] = true
		}
	case "pass", "fail", "skip":
		r.outcome[t] = e.Action
		r.order = append(r.order, t)
		if live {
			r.show(t, e)
		}
	}
}

func (r *run) show(t test, e event) {
	switch {
	case t.name == "" && e.Action == "skip": // it has no tests
	case t.name == "":
		word := map[string]string{"pass": "ok  ", "fail": "FAIL"}[e.Action]
		fmt.Printf("%s %s %.1fs\n", word, t.pkg, e.Elapsed)
		if e.Action == "fail" {
			fmt.Print(strings.Join(r.output[t], ""))
		}
	case e.Action == "fail":
		fmt.Printf("---- %s %s\n%s", t.pkg, t.name, strings.Join(r.output[t], ""))
	}
}

// summarise reports whether all is well.
func (r *run) summarise(w io.Writer) bool {
	var failed, skipped []string
	passed := 0
	failedIn := map[string]bool{}
	for _, t := range r.order {
		if t.name == "" || r.parent[t] {
			continue
		}
		switch r.outcome[t] {
		case "pass":
			passed++
		case "fail":
			failed = append(failed, t.pkg+" "+t.name)
			failedIn[t.pkg] = true
		case "skip":
			skipped = append(skipped, fmt.Sprintf("%s %s: %s", t.pkg, t.name, reason(r.output[t])))
		}
	}
	// What failed without a test of its own: a parent's own check, a panic, a
	// timeout, a package that does not build.
	for _, t := range r.order {
		if r.outcome[t] == "fail" && !failedIn[t.pkg] && (t.name != "" || !r.parentFailed(t.pkg)) {
			failed = append(failed, strings.TrimSpace(t.pkg+" "+t.name))
		}
	}
	if len(r.order) == 0 {
		failed = append(failed, r.broken...)
	}
	for _, list := range []struct {
		title string
		lines []string
	}{{"Skipped:", skipped}, {"Failed:", failed}} {
		if len(list.lines) > 0 {
			slices.Sort(list.lines)
			fmt.Fprintf(w, "\n%s\n  %s\n", list.title, strings.Join(list.lines, "\n  "))
		}
	}
	fmt.Fprintf(w, "\n%d passed, %d failed, %d skipped\n", passed, len(failed), len(skipped))
	return len(failed) == 0 && passed > 0
}

func (r *run) parentFailed(pkg string) bool {
	for t := range r.parent {
		if t.pkg == pkg && r.outcome[t] == "fail" {
			return true
		}
	}
	return false
}

// position is the "file.go:12: " before a test's words.
var position = regexp.MustCompile(`^\S+\.go:\d+: `)

// reason is what a test said when it skipped itself.
func reason(output []string) string {
	for _, line := range slices.Backward(output) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "---") || strings.HasPrefix(line, "===") {
			continue
		}
		return position.ReplaceAllString(line, "")
	}
	return "no reason given"
}
