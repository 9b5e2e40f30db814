package proxy

import (
	"sync"
	"sync/atomic"
	"time"
)

// outcome is what became of a request.
type outcome int

const (
	switched    outcome = iota // to another protocol, and carried to its end
	succeeded                  // 2xx
	redirected                 // 3xx
	faulty                     // 4xx
	failed                     // 5xx, the proxy's own included
	brokenOff                  // there was no answer, or only a part of one
	overLimit                  // the sandbox had too many already
	numOutcomes int     = iota
)

var outcomeNames = [numOutcomes]string{"1xx", "2xx", "3xx", "4xx", "5xx", "broken", "refused"}

func outcomeOf(status int, broken bool) outcome {
	switch {
	case broken || status == 0:
		return brokenOff
	case status < 200:
		return switched
	default:
		return min(outcome(status/100-1), failed)
	}
}

// usage counts what goes on with one port of a sandbox, or with all there are.
type usage struct {
	requests     [numOutcomes]atomic.Int64 // that have ended
	open         atomic.Int64              // requests and upgraded connections under way
	sent         atomic.Int64              // bytes of bodies and upgraded connections, to clients
	received     atomic.Int64              // likewise, from clients
	dialFailures atomic.Int64              // requests for which no connection could be made
	answers      histogram                 // time until the header of an application's answer

	heard  bool // an application has answered on the port before it was counted apart
	others bool // it is of all the ports that are not counted apart
}

// answerBounds are the upper bounds of the histogram's buckets. Few, because each
// costs a time series for each port; wide, because long polls are answers too.
var answerBounds = [...]time.Duration{
	500 * time.Microsecond, time.Millisecond, 2500 * time.Microsecond, 10 * time.Millisecond, 25 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, time.Second, 5 * time.Second, 30 * time.Second,
}

type histogram struct {
	buckets [len(answerBounds) + 1]atomic.Int64 // not cumulative
	nanos   atomic.Int64
}

func (h *histogram) observe(d time.Duration) {
	i := 0
	for i < len(answerBounds) && d > answerBounds[i] {
		i++
	}
	h.buckets[i].Add(1)
	h.nanos.Add(int64(d))
}

// tally counts bytes, for itself and for what it is a part of.
type tally struct {
	n      atomic.Int64
	totals [2]*atomic.Int64 // may be nil
}

func (t *tally) Add(n int64) {
	t.n.Add(n)
	for _, total := range t.totals {
		if total != nil {
			total.Add(n)
		}
	}
}

const (
	// maxPorts bounds the ports of a sandbox that are counted apart, beside the guest
	// agent's. The others are counted as one, port 0.
	maxPorts   = 64
	otherPorts = 0
	// maxSilentPorts is how many of them may be such as no application has answered on
	// yet: who tries all ports makes no metrics.
	maxSilentPorts = 8
	// What no request came for this long is forgotten, in case that nobody evicts it.
	maxIdleAccount = time.Hour
	sweepInterval  = time.Minute
)

// ledger has the usage of all sandboxes that are resolved and in use.
type ledger struct {
	all usage // of every request, those for sandboxes that there are not included

	mu       sync.RWMutex // guards the following; taken with Proxy.mu held, never the other way round
	accounts map[string]*account
	swept    time.Time
}

// account is the usage of one sandbox.
type account struct {
	ports map[uint16]*usage
	used  atomic.Int64 // when last, in Unix seconds
}

// enter finds the usage of a port and counts a stream as open there. It returns nil
// when there is none yet.
func (l *ledger) enter(d Destination, now time.Time) *usage {
	l.mu.RLock()
	defer l.mu.RUnlock()
	a := l.accounts[d.SandboxID]
	if a == nil || a.ports[d.Port] == nil {
		return nil
	}
	if second := now.Unix(); a.used.Load() != second {
		a.used.Store(second)
	}
	u := a.ports[d.Port]
	u.open.Add(1)
	return u
}

// open is enter that makes what is missing.
func (l *ledger) open(d Destination, now time.Time) *usage {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.accounts[d.SandboxID]
	if a == nil {
		l.sweep(now)
		a = &account{ports: make(map[uint16]*usage)}
		if l.accounts == nil {
			l.accounts = make(map[string]*account)
		}
		l.accounts[d.SandboxID] = a
	}
	a.used.Store(now.Unix())
	u := a.port(d.Port)
	u.open.Add(1)
	return u
}

// port returns the usage of a port, or of all those for which there is no room.
func (a *account) port(port uint16) *usage {
	if u := a.ports[port]; u != nil {
		return u
	}
	if port != AgentPort && !a.hasRoom() {
		port = otherPorts
	}
	if a.ports[port] == nil {
		a.ports[port] = &usage{others: port == otherPorts}
	}
	return a.ports[port]
}

// hasRoom reports whether a further port can be counted apart.
func (a *account) hasRoom() bool {
	apart, silent := 0, 0
	for port, u := range a.ports {
		if port == AgentPort || port == otherPorts {
			continue
		}
		apart++
		if !u.heard && u.answers.nanos.Load() == 0 {
			silent++
		}
	}
	return apart < maxPorts && silent < maxSilentPorts
}

// heard has a port counted apart from now on, because an application has answered on
// it.
func (l *ledger) heard(d Destination) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.accounts[d.SandboxID]
	if a == nil || a.ports[d.Port] != nil {
		return
	}
	if len(a.ports) < maxPorts {
		a.ports[d.Port] = &usage{heard: true}
	}
}

// sweep forgets sandboxes that have not been in use for long.
func (l *ledger) sweep(now time.Time) {
	if now.Sub(l.swept) < sweepInterval {
		return
	}
	l.swept = now
	for id, a := range l.accounts {
		open := int64(0)
		for _, u := range a.ports {
			open += u.open.Load()
		}
		if open == 0 && now.Unix()-a.used.Load() > int64(maxIdleAccount/time.Second) {
			delete(l.accounts, id)
		}
	}
}

// forget drops what is known of a sandbox. What is still under way counts for the
// whole, and for what nobody sees any more.
func (l *ledger) forget(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.accounts, id)
}

// refused counts a request that was over the limit of its sandbox.
func (l *ledger) refused(d Destination) {
	l.all.requests[overLimit].Add(1)
	l.mu.RLock()
	defer l.mu.RUnlock()
	if a := l.accounts[d.SandboxID]; a != nil {
		if u := a.ports[d.Port]; u != nil {
			u.requests[overLimit].Add(1)
		} else if u := a.ports[otherPorts]; u != nil {
			u.requests[overLimit].Add(1)
		}
	}
}
