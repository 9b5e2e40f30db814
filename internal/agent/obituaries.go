package agent

import (
	"os"
	"sync"
	"time"

	"github.com/wrenn/wrenn/internal/guest"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// obituary is what is remembered of a sandbox that has ended.
type obituary struct {
	ID     sandbox.ID       `json:"id"`
	State  sandbox.State    `json:"state"` // Stopped or Failed
	Reason string           `json:"reason"`
	Time   time.Time        `json:"time"`
	Logs   []guest.LogEntry `json:"-"` // nil once they had to give way to younger ones
}

func (ob obituary) logBytes() (n int) {
	for _, e := range ob.Logs {
		n += entrySize(e)
	}
	return n
}

const (
	obituariesKept = 1000
	obituaryAge    = time.Hour
	obituaryLogs   = 32 << 20 // bytes of logs, all sandboxes together
	watcherBuffer  = 256      // events; a watcher that falls further behind is cut off and lists anew
)

// obituaries remembers the sandboxes that ended lately and tells watchers of
// those whose end nobody asked for.
type obituaries struct {
	dir string // where they are journaled; set by load

	mu       sync.Mutex
	order    []obituary // oldest first
	logBytes int        // of all in order
	watchers map[chan obituary]struct{}
}

func newObituaries() *obituaries {
	return &obituaries{watchers: make(map[chan obituary]struct{})}
}

func (o *obituaries) add(ob obituary, announce bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	drop := max(0, len(o.order)+1-obituariesKept)
	for drop < len(o.order) && time.Since(o.order[drop].Time) > obituaryAge {
		drop++
	}
	for _, old := range o.order[:drop] {
		o.logBytes -= old.logBytes()
		if o.dir != "" {
			_ = os.Remove(endedFile(o.dir, old.ID)) // the next load tries again
		}
	}
	o.order = append(o.order[drop:], ob)
	o.logBytes += ob.logBytes()
	for i := 0; o.logBytes > obituaryLogs; i++ {
		o.logBytes -= o.order[i].logBytes()
		o.order[i].Logs = nil
	}
	if !announce {
		return
	}
	for w := range o.watchers {
		select {
		case w <- ob:
		default:
			delete(o.watchers, w)
			close(w)
		}
	}
}

// watch returns a channel of the ends to come. It is closed when the watcher
// has fallen too far behind. Call stop when done.
func (o *obituaries) watch() (ends <-chan obituary, stop func()) {
	w := make(chan obituary, watcherBuffer)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.watchers[w] = struct{}{}
	return w, func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		delete(o.watchers, w)
	}
}

func (o *obituaries) list() []obituary {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]obituary(nil), o.order...)
}

// find returns the latest obituary of that id.
func (o *obituaries) find(id sandbox.ID) (obituary, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := len(o.order) - 1; i >= 0; i-- {
		if o.order[i].ID == id {
			return o.order[i], true
		}
	}
	return obituary{}, false
}
