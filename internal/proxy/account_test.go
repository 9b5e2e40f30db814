package proxy

import (
	"context"
	"fmt"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/accesslog"
)

// BenchmarkAccounting is what metrics and access log add to a request.
func BenchmarkAccounting(b *testing.B) {
	log, err := accesslog.Open(filepath.Join(b.TempDir(), "access.log"), nil)
	if err != nil {
		b.Fatal(err)
	}
	defer log.Close(context.Background())
	for name, log := range map[string]*accesslog.Log{"metrics": nil, "metrics and access log": log} {
		b.Run(name, func(b *testing.B) {
			p := New(Config{AccessLog: log})
			r := httptest.NewRequest("GET", "/index.html", nil)
			d := Destination{SandboxID: "aaaaaaaaaaaaaaaaaaaa", Port: 80}
			w := httptest.NewRecorder()
			first, _ := p.begin(w, r, d)
			first.target, _ = rawTarget(r)
			b.ReportAllocs()
			for b.Loop() {
				s := first
				s.open(r)
				p.attribute(s)
				s.answered(200)
				s.sent.Add(1024)
				s.fromGuest, s.complete = true, true
				s.settle()
			}
		})
	}
}

func TestSandboxThatNobodyEvictsIsForgottenInTheEnd(t *testing.T) {
	var l ledger
	begun := time.Unix(1e9, 0)
	destination := func(i int) Destination { return Destination{SandboxID: fmt.Sprint(i), Port: 80} }
	open := func(i int, at time.Time) *usage { return l.open(destination(i), at) }
	open(0, begun) // and stays open
	open(1, begun).open.Add(-1)
	open(2, begun).open.Add(-1)
	l.enter(destination(2), begun.Add(30*time.Minute)).open.Add(-1)
	open(3, begun.Add(maxIdleAccount+time.Second)).open.Add(-1)
	for i, want := range []bool{true, false, true, true} {
		if has := l.accounts[fmt.Sprint(i)] != nil; has != want {
			t.Errorf("sandbox %d is known: %v", i, has)
		}
	}
}
