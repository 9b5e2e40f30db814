package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// stream is one request under way, and the http.ResponseWriter that its answer
// goes through. It exists so that Evict can break it off at any moment.
type stream struct {
	http.ResponseWriter
	proxy  *Proxy
	guest  *guest
	dest   Destination
	target requestTarget
	addr   netip.AddrPort // set once resolved

	ctx       context.Context // of the request to the guest
	cancel    context.CancelFunc
	clientCtx context.Context // done when the client has gone
	upload    *upload         // the request's body; nil without one
	http1     bool            // the client speaks HTTP/1
	method    string          // of the request to the guest
	tunnel    bool            // the client asks for the bare port
	extended  bool            // the client asks for a WebSocket over HTTP/2
	upgrade   string          // the protocol that the client asks to switch to; empty for none

	hop        netip.AddrPort // what the request is sent to: addr, or a host agent before it
	hopPrefix  string         // what goes before the target's path on the way there
	host       string         // what the application gets as Host
	clientHost string         // what the client sent as Host
	mask       string         // host, where it is another than clientHost
	trusted    bool           // the forwarding headers are those of a front and go on as they are

	begun      time.Time
	status     int           // of the answer; 0 while there is none
	answerTime time.Duration // until its header
	fromGuest  bool          // the answer is the application's
	complete   bool          // all of it went out, as far as can be told
	sent       tally         // bytes of the answer's body that went to the client
	received   tally         // bytes of the request's body that came from the client
	usages     [2]*usage     // of all sandboxes, and of the port; the latter may be nil
	protocol   string        // of the client, "HTTP/1.1"
	client     string        // its IP address

	mu       sync.Mutex
	aborted  bool     // by Evict
	failing  bool     // the answer is the proxy's own
	started  bool     // the header is on its way to the client
	hijacked net.Conn // the client's connection after an upgrade
	finished bool     // the handler returns; the ResponseWriter is not ours any more
}

// upload is a request's body that remembers how reading it ended.
type upload struct {
	io.ReadCloser
	count    *tally
	complete atomic.Bool // read to its proper end
	broken   atomic.Bool // malformed or broken off
}

func (u *upload) Read(p []byte) (int, error) {
	n, err := u.ReadCloser.Read(p)
	if n > 0 {
		u.count.Add(int64(n))
	}
	switch err {
	case nil:
	case io.EOF:
		u.complete.Store(true)
	default:
		u.broken.Store(true)
	}
	return n, err
}

// begin enters a request into the books of its sandbox, unless that has too many
// already or the proxy is closed: then it returns what to answer.
func (p *Proxy) begin(w http.ResponseWriter, r *http.Request, d Destination) (*stream, *failure) {
	s := &stream{
		ResponseWriter: w, proxy: p, dest: d, begun: time.Now(),
		clientCtx: r.Context(), http1: r.ProtoMajor == 1, method: r.Method,
		upgrade: upgradeOf(r, d), host: r.Host, clientHost: r.Host,
	}
	if s.extended = s.upgrade != "" && r.ProtoMajor == 2; s.extended {
		s.method = http.MethodGet
	}
	if r.ContentLength != 0 || s.extended { // a WebSocket may be asked for and ended at once
		s.upload = &upload{ReadCloser: r.Body, count: &s.received}
	}
	s.ctx, s.cancel = context.WithCancel(r.Context())

	p.mu.Lock()
	defer p.mu.Unlock()
	g := p.guests[d.SandboxID]
	if g == nil && !p.closed {
		g = p.newGuest(d.SandboxID)
		p.guests[d.SandboxID] = g
	}
	if f := p.refuse(g, d); f != nil {
		s.cancel()
		return nil, f
	}
	s.guest = g
	g.streams[s] = struct{}{}
	p.open++
	if d.Port != AgentPort {
		g.users++
	}
	return s, nil
}

// refuse says why a sandbox gets no further stream. The guest agent has a share of
// its own, which applications cannot use up. Called with p.mu held.
func (p *Proxy) refuse(g *guest, d Destination) *failure {
	agents := 0
	if g != nil {
		agents = len(g.streams) - g.users
	}
	full := failure{SandboxID: d.SandboxID, Code: http.StatusServiceUnavailable}
	switch {
	case p.closed:
		full.Message = "The proxy is shutting down"
	case d.Port == AgentPort && agents >= p.limit:
		full.Message = "Too many requests to the sandbox's guest agent are open at once: end some, then try again"
	case d.Port != AgentPort && g.users >= p.limit:
		full.Message, full.Port = "Too many connections to the applications of this sandbox are open at once: close some, then try again", d.Port
	default:
		return nil
	}
	refused := full // a failure that is returned is made on the heap, and few are
	return &refused
}

// aim sets where the request goes.
func (s *stream) aim(where Target) {
	s.addr = netip.AddrPortFrom(where.Addr, s.dest.Port)
	s.hop, s.trusted = s.addr, s.proxy.hop
	if where.Agent.IsValid() {
		s.hop = where.Agent
		s.hopPrefix = pathForm + s.dest.SandboxID + "/" + strconv.Itoa(int(s.dest.Port))
	}
}

// end takes it out again.
func (p *Proxy) end(s *stream) {
	s.settle()
	s.mu.Lock()
	s.finished = true
	s.mu.Unlock()
	s.cancel()

	p.mu.Lock()
	defer p.mu.Unlock()
	delete(s.guest.streams, s)
	p.open--
	if s.dest.Port != AgentPort {
		s.guest.users--
	}
	p.drop(s.guest)
}

// abort breaks the stream off. Cancelling frees whatever waits for the guest;
// deadlines free what waits for the client: a reader that has stopped reading
// would hold the handler for ever.
func (s *stream) abort() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.finished || s.aborted {
		return
	}
	s.aborted = true
	s.cancel()
	if s.hijacked != nil {
		breakOff(s.hijacked)
		return
	}
	past := time.Unix(1, 0)
	client := http.NewResponseController(s.ResponseWriter)
	// Errors mean that the writer has no deadlines (none of a real server).
	if s.upload != nil {
		_ = client.SetReadDeadline(past)
	}
	if s.started {
		_ = client.SetWriteDeadline(past)
	}
}

func (s *stream) isAborted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.aborted
}

// WriteHeader lets the guest's answer through unless the sandbox has been evicted:
// then nothing of it may begin to look like a good one.
func (s *stream) WriteHeader(status int) {
	s.mu.Lock()
	aborted := s.aborted && !s.failing
	if !aborted && status >= 200 {
		s.started = true
	}
	s.mu.Unlock()
	if status < 200 {
		// Comes from a goroutine of the transport, where a panic would be fatal.
		// The server says 100 by itself when the body is first read, which is when
		// the guest has said so: passed on it might come twice.
		if !aborted && status != http.StatusContinue {
			s.ResponseWriter.WriteHeader(status)
		}
		return
	}
	if aborted {
		panic(http.ErrAbortHandler)
	}
	s.answered(status)
	h := s.Header()
	if h["Content-Type"] == nil {
		h["Content-Type"] = nil // keeps net/http from guessing one
	}
	if s.http1 && s.upload != nil && !s.upload.complete.Load() {
		// A full-duplex net/http connection goes on to read a next request even
		// where the rest of this body turns out malformed, and what a client has
		// put there may be anything.
		h.Set("Connection", "close")
	}
	s.ResponseWriter.WriteHeader(status)
}

// takeOver takes the client's connection over, after the header that is prepared has
// been sent with the given status, and keeps hold of it for abort. It also returns
// what the client has sent already.
func (s *stream) takeOver(status int) (net.Conn, []byte, error) {
	conn, buf, err := s.hijack()
	if err != nil {
		return nil, nil, err
	}
	early, _ := buf.Reader.Peek(buf.Reader.Buffered())
	_, err = fmt.Fprintf(buf, "HTTP/1.1 %d %s\r\n", status, http.StatusText(status))
	err = errors.Join(err, s.Header().Write(buf))
	_, err2 := buf.WriteString("\r\n")
	if err = errors.Join(err, err2, buf.Flush()); err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, early, nil
}

func (s *stream) hijack() (net.Conn, *bufio.ReadWriter, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.aborted {
		return nil, nil, errEvicted
	}
	conn, buf, err := http.NewResponseController(s.ResponseWriter).Hijack()
	if err == nil {
		s.hijacked, s.started = conn, true
	}
	return conn, buf, err
}

// stopUpload makes a read of the request's body return that waits for the client.
func (s *stream) stopUpload() {
	// An error means that the writer has no deadlines (none of a real server).
	_ = http.NewResponseController(s.ResponseWriter).SetReadDeadline(time.Unix(1, 0))
}

// Unwrap gives http.ResponseController the way to the server's writer.
func (s *stream) Unwrap() http.ResponseWriter { return s.ResponseWriter }
