package proxy

import "sync/atomic"

// tally counts bytes, for itself and for what it is a part of.
type tally struct {
	n     atomic.Int64
	total *atomic.Int64 // may be nil
}

func (t *tally) Add(n int64) {
	t.n.Add(n)
	if t.total != nil {
		t.total.Add(n)
	}
}
