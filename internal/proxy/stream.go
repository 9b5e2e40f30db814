package proxy

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// stream is one request under way, and the http.ResponseWriter that its answer
// goes through. It exists so that Evict can break it off at any moment.
type stream struct {
	http.ResponseWriter
	guest  *guest
	dest   Destination
	target requestTarget
	addr   netip.AddrPort // set once resolved

	ctx       context.Context // of the request to the guest
	cancel    context.CancelFunc
	clientCtx context.Context // done when the client has gone
	upload    *upload         // the request's body; nil without one
	http1     bool            // the client speaks HTTP/1

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
	complete atomic.Bool // read to its proper end
	broken   atomic.Bool // malformed or broken off
}

func (u *upload) Read(p []byte) (int, error) {
	n, err := u.ReadCloser.Read(p)
	switch err {
	case nil:
	case io.EOF:
		u.complete.Store(true)
	default:
		u.broken.Store(true)
	}
	return n, err
}

type streamKey struct{}

// begin enters a request into the books of its sandbox. It reports false when
// the proxy is closed.
func (p *Proxy) begin(w http.ResponseWriter, r *http.Request, d Destination) (*stream, bool) {
	s := &stream{
		ResponseWriter: w, dest: d,
		clientCtx: r.Context(), http1: r.ProtoMajor == 1,
	}
	if r.ContentLength != 0 {
		s.upload = &upload{ReadCloser: r.Body}
	}
	ctx, cancel := context.WithCancel(r.Context())
	s.ctx, s.cancel = context.WithValue(ctx, streamKey{}, s), cancel

	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		cancel()
		return nil, false
	}
	g := p.guests[d.SandboxID]
	if g == nil {
		g = p.newGuest(d.SandboxID)
		p.guests[d.SandboxID] = g
	}
	s.guest = g
	g.streams[s] = struct{}{}
	return s, true
}

// end takes it out again.
func (p *Proxy) end(s *stream) {
	s.mu.Lock()
	s.finished = true
	s.mu.Unlock()
	s.cancel()

	p.mu.Lock()
	defer p.mu.Unlock()
	delete(s.guest.streams, s)
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
		resetOnClose(s.hijacked)
		_ = s.hijacked.Close() // an error means that it was closed already
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

// Hijack hands out the client's connection and keeps hold of it for abort.
func (s *stream) Hijack() (net.Conn, *bufio.ReadWriter, error) {
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

// Unwrap gives http.ResponseController the way to the server's writer.
func (s *stream) Unwrap() http.ResponseWriter { return s.ResponseWriter }

// rewrite turns the client's request into the one to the guest. The host and the
// target stay what they were; forwarding headers are ours alone, so nobody can
// pretend to come from elsewhere.
func rewrite(pr *httputil.ProxyRequest) {
	s := pr.In.Context().Value(streamKey{}).(*stream)
	pr.Out.URL = s.target.url(s.addr.String(), strings.TrimPrefix(pr.In.URL.Path, s.dest.Prefix))
	pr.Out.Header.Del("X-Real-Ip")
	pr.Out.Header.Del("X-Forwarded-Port")
	pr.Out.Header.Del("X-Forwarded-Server")
	pr.Out.Header.Del("X-Forwarded-Prefix")
	if s.dest.Prefix != "" {
		pr.Out.Header.Set("X-Forwarded-Prefix", s.dest.Prefix)
	}
	pr.SetXForwarded()
	// The server fills the inbound map in when the body ends; a copy stays empty.
	// Trailers need a chunked body on HTTP/1.1.
	pr.Out.Trailer = nil
	if pr.In.ContentLength < 0 {
		pr.Out.Trailer = pr.In.Trailer
	}
}
