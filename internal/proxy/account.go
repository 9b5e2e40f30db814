package proxy

import (
	"net"
	"net/http"
	"time"

	"github.com/wrenn/wrenn/internal/accesslog"
)

// open counts a request as under way, before it is known whether its sandbox is there.
func (s *stream) open(r *http.Request) {
	s.protocol, s.client = r.Proto, clientOf(r, s.proxy.hop)
	s.charge(0, &s.proxy.ledger.all)
	s.usages[0].open.Add(1)
}

// attribute counts it for its sandbox, which has been resolved: ids that anybody can
// make up leave no trace.
func (p *Proxy) attribute(s *stream) {
	u := p.ledger.enter(s.dest, s.begun)
	if u == nil {
		// Under the lock so that Evict, which forgets the sandbox, comes before or after.
		p.mu.Lock()
		if !s.guest.gone {
			u = p.ledger.open(s.dest, s.begun)
		}
		p.mu.Unlock()
	}
	if u != nil {
		s.charge(1, u)
	}
}

func (s *stream) charge(i int, u *usage) {
	s.usages[i] = u
	s.sent.totals[i], s.received.totals[i] = &u.sent, &u.received
}

// answered notes the status of the answer whose header is on its way.
func (s *stream) answered(status int) {
	s.status, s.answerTime = status, time.Since(s.begun)
}

// switched notes that another protocol goes on from here. Over HTTP/2 the status that
// says so is 200; it is counted as what it is.
func (s *stream) switched() {
	s.fromGuest = true
	s.answered(http.StatusSwitchingProtocols)
}

// dialFailed counts a request for which no connection to the guest could be made.
func (s *stream) dialFailed() {
	for _, u := range s.usages {
		if u != nil {
			u.dialFailures.Add(1)
		}
	}
}

// Write is for the proxy's own answers. The guest's go straight to the server.
func (s *stream) Write(b []byte) (int, error) {
	n, err := s.ResponseWriter.Write(b)
	s.sent.Add(int64(n))
	return n, err
}

// settle counts a request as ended, and writes it to the access log.
func (s *stream) settle() {
	broken := !s.complete || (s.status == http.StatusSwitchingProtocols && s.isAborted())
	for _, u := range s.usages {
		if u == nil {
			continue
		}
		u.open.Add(-1)
		u.requests[outcomeOf(s.status, broken)].Add(1)
		if s.fromGuest && s.status != 0 {
			u.answers.observe(s.answerTime)
		}
	}
	if u := s.usages[1]; u != nil && u.others && s.fromGuest {
		s.proxy.ledger.heard(s.dest)
	}
	log := s.proxy.accessLog
	if log == nil {
		return
	}
	log.Write(&accesslog.Entry{
		Time: s.begun, Sandbox: s.dest.SandboxID, Port: s.dest.Port,
		Method: s.method, Path: s.target.path, Protocol: s.protocol, Client: s.client,
		Status: s.status, Sent: s.sent.n.Load(), Received: s.received.n.Load(),
		Duration: time.Since(s.begun), Answer: s.answerTime, Broken: broken,
	})
}

// turnAway answers a request that does not become a stream.
func (p *Proxy) turnAway(w http.ResponseWriter, r *http.Request, d Destination, f failure) {
	begun := time.Now()
	writeFailure(w, r, f)
	p.turnedAway(r, d, f.Code, begun)
}

// turnedAway counts a request that was answered without becoming a stream.
func (p *Proxy) turnedAway(r *http.Request, d Destination, status int, begun time.Time) {
	p.ledger.all.requests[outcomeOf(status, false)].Add(1)
	p.logTurnedAway(r, d, status, begun)
}

// refuseStream answers a request for which begin has no room.
func (p *Proxy) refuseStream(w http.ResponseWriter, r *http.Request, d Destination, f failure) {
	begun := time.Now()
	writeFailure(w, r, f)
	p.ledger.refused(d)
	p.logTurnedAway(r, d, f.Code, begun)
}

func (p *Proxy) logTurnedAway(r *http.Request, d Destination, status int, begun time.Time) {
	if p.accessLog == nil {
		return
	}
	target, _ := rawTarget(r)
	took := time.Since(begun)
	p.accessLog.Write(&accesslog.Entry{
		Time: begun, Sandbox: d.SandboxID, Port: d.Port,
		Method: r.Method, Path: target.path, Protocol: r.Proto, Client: clientOf(r, p.hop),
		Status: status, Duration: took, Answer: took,
	})
}

// clientOf returns the IP address that a request comes from: behind a front, what
// the front says.
func clientOf(r *http.Request, hop bool) string {
	if hop {
		if said := r.Header.Get("X-Forwarded-For"); said != "" {
			return said
		}
	}
	ip, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return ip
}
