package main

import (
	"strings"
	"testing"
)

func TestSummaryCountsLeavesAndTellsReasons(t *testing.T) {
	tests := []struct {
		name, in string
		want     string // the end of the summary
		ok       bool
	}{
		{"nothing ran", "", "\n0 passed, 0 failed, 0 skipped\n", false},
		{"a parent counts as its subtests", `{"Action":"run","Package":"p","Test":"T"}
{"Action":"run","Package":"p","Test":"T/a"}
{"Action":"pass","Package":"p","Test":"T/a"}
{"Action":"pass","Package":"p","Test":"T"}
{"Action":"pass","Package":"p"}`, "\n1 passed, 0 failed, 0 skipped\n", true},
		{"a skipped test says why", `{"Action":"run","Package":"p","Test":"S"}
{"Action":"output","Package":"p","Test":"S","Output":"=== RUN   S\n"}
{"Action":"output","Package":"p","Test":"S","Output":"    s_test.go:9: needs root\n"}
{"Action":"output","Package":"p","Test":"S","Output":"--- SKIP: S (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"S"}
{"Action":"pass","Package":"p","Test":"A"}`, "\nSkipped:\n  p S: needs root\n\n1 passed, 0 failed, 1 skipped\n", true},
		{"a failed subtest counts once", `{"Action":"run","Package":"p","Test":"T/a"}
{"Action":"fail","Package":"p","Test":"T/a"}
{"Action":"fail","Package":"p","Test":"T"}
{"Action":"fail","Package":"p"}`, "\nFailed:\n  p T/a\n\n0 passed, 1 failed, 0 skipped\n", false},
		{"a parent's own failure counts", `{"Action":"run","Package":"p","Test":"T/a"}
{"Action":"pass","Package":"p","Test":"T/a"}
{"Action":"fail","Package":"p","Test":"T"}
{"Action":"fail","Package":"p"}`, "\nFailed:\n  p T\n\n1 passed, 1 failed, 0 skipped\n", false},
		{"a package that does not build counts", `# p
{"Action":"pass","Package":"q","Test":"A"}
{"Action":"fail","Package":"p"}`, "\nFailed:\n  p\n\n1 passed, 1 failed, 0 skipped\n", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := run{outcome: map[test]string{}, output: map[test][]string{}, parent: map[test]bool{}}
			if err := r.read(strings.NewReader(tt.in), false); err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			if ok := r.summarise(&out); ok != tt.ok || out.String() != tt.want {
				t.Errorf("got %v and\n%q\nwant %v and\n%q", ok, out.String(), tt.ok, tt.want)
			}
		})
	}
}
