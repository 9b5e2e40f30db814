package process

import (
	"slices"
	"sync"
	"time"

	rpc "github.com/wrenn/wrenn/api/proto/process"
)

const (
	// keepEnded is how long a process that ended can still be connected to.
	keepEnded = 30 * time.Second
	// maxEnded bounds how many of them are kept.
	maxEnded = 512
	// maxEndedOutput bounds the output that they keep all together, in bytes.
	maxEndedOutput = 8 << 20
)

// entry is a process as clients know it.
type entry struct {
	*Process
	config *rpc.ProcessConfig
	tag    *string

	number  uint64    // the younger, the higher; pids begin anew at some point
	expires time.Time // once it has ended: when it is forgotten
}

// table finds processes by what clients call them.
type table struct {
	mu    sync.Mutex
	last  uint64 // number of the youngest entry
	live  map[uint32]*entry
	ended []*entry // oldest first
}

func (t *table) add(e *entry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.live == nil {
		t.live = make(map[uint32]*entry)
	}
	t.last++
	e.number = t.last
	t.live[uint32(e.pid)] = e
}

// retire keeps an ended process for late comers, for a while.
func (t *table) retire(e *entry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	// The kernel may have given the number to a younger process already.
	if t.live[uint32(e.pid)] == e {
		delete(t.live, uint32(e.pid))
	}
	if len(t.ended) >= maxEnded {
		t.ended = slices.Delete(t.ended, 0, 1)
	}
	t.ended = append(t.ended, e)
	kept := 0
	for _, old := range slices.Backward(t.ended) {
		if kept += old.out.held(); kept > maxEndedOutput {
			old.out.discard()
		}
	}
	e.expires = time.Now().Add(keepEnded)
	if len(t.ended) == 1 {
		time.AfterFunc(keepEnded, t.expire)
	}
}

// expire forgets the processes whose time is up. One timer is pending while any
// are kept, rather than one for each, which would hold on to it for its time
// even after it had to give way.
func (t *table) expire() {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	t.ended = slices.DeleteFunc(t.ended, func(e *entry) bool { return !e.expires.After(now) })
	if len(t.ended) > 0 {
		time.AfterFunc(t.ended[0].expires.Sub(now), t.expire)
	}
}

// running returns the live processes, by pid.
func (t *table) running() []*entry {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]*entry, 0, len(t.live))
	for _, e := range t.live {
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b *entry) int { return a.pid - b.pid })
	return list
}

// find returns the process selected, nil when there is none. Live ones come
// before those that ended, which count only with ended set; of several with one
// tag the youngest counts.
func (t *table) find(s *rpc.ProcessSelector, ended bool) *entry {
	t.mu.Lock()
	defer t.mu.Unlock()
	matches := func(e *entry) bool {
		if tag, ok := s.GetSelector().(*rpc.ProcessSelector_Tag); ok {
			return e.tag != nil && *e.tag == tag.Tag
		}
		return uint32(e.pid) == s.GetPid()
	}
	var found *entry
	for _, e := range t.live {
		if matches(e) && (found == nil || e.number > found.number) {
			found = e
		}
	}
	if found != nil || !ended {
		return found
	}
	for _, e := range slices.Backward(t.ended) {
		if matches(e) {
			return e
		}
	}
	return nil
}
