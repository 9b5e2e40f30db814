package reclaim

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

func TestMemoryIsGivenBackOncePerDelayAndAfterTheLastWork(t *testing.T) {
	var pending []func()
	freed := 0
	r := Reclaimer{after: func(_ time.Duration, f func()) { pending = append(pending, f) }, free: func() { freed++ }}
	h := r.After(http.NotFoundHandler())
	serve := func(path string) { h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", path, nil)) }
	fire := func() {
		f := pending[0]
		pending = pending[1:]
		f()
	}
	serve("/health")
	serve("/metrics")
	if len(pending) != 0 {
		t.Fatal("polling by the host counts as work")
	}
	serve("/files")
	serve("/files")
	serve("/files")
	if len(pending) != 1 {
		t.Fatalf("%d timers for three requests", len(pending))
	}
	fire()
	if freed != 1 || len(pending) != 1 {
		t.Fatalf("freed %d times, %d timers: what ended since needs another", freed, len(pending))
	}
	fire()
	if freed != 2 || len(pending) != 0 {
		t.Errorf("freed %d times, %d timers left when idle", freed, len(pending))
	}
}
