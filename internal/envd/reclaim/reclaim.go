// Package reclaim gives memory back to the system after work. Go's runtime does
// that late and in part, and the agents of hundreds of idle sandboxes add up.
package reclaim

import (
	"net/http"
	"runtime"
	"runtime/debug"
	"sync"
	"time"
)

// delay is longer than what ended is kept for late comers, which is garbage only
// then.
const delay = 40 * time.Second

// Reclaimer gives memory back some time after work has ended. The zero value is
// ready; nothing runs while there was no work.
type Reclaimer struct {
	mu    sync.Mutex
	armed bool
	again bool // work ended since it was armed

	after func(time.Duration, func()) // time.AfterFunc unless a test stands in
	free  func()
}

// Soon has memory given back: within two delays, at most once per delay.
func (r *Reclaimer) Soon() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.again = r.armed
	if !r.armed {
		r.arm()
	}
}

func (r *Reclaimer) arm() {
	r.armed = true
	if r.after == nil {
		r.after = func(d time.Duration, f func()) { time.AfterFunc(d, f) }
		r.free = giveBack
	}
	r.after(delay, r.fire)
}

func (r *Reclaimer) fire() {
	r.mu.Lock()
	r.armed = false
	if r.again {
		r.again = false
		r.arm()
	}
	r.mu.Unlock()
	r.free()
}

func giveBack() {
	runtime.GC() // what pools hold goes with the second collection
	debug.FreeOSMemory()
}

// After calls Soon when a request has been served, but not for those that the
// host makes all the time.
func (r *Reclaimer) After(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		switch req.URL.Path {
		case "/health", "/metrics", "/logs":
		default:
			defer r.Soon()
		}
		next.ServeHTTP(w, req)
	})
}
