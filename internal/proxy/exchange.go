package proxy

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httputil"
	"os"
	"strconv"
	"sync"
	"time"
)

const (
	// continueTimeout is how long a client that asked waits for the guest to want
	// its body, before it gets the word from us (RFC 9110, 10.1.1).
	continueTimeout = time.Second
	// informational answers that may come before the final one.
	maxInformational = 16
)

var (
	errUnaskedUpgrade  = errors.New("the application switched protocols and nobody had asked it to")
	errNoStatus        = errors.New("the status of the application's answer is none")
	errTooManyInterims = errors.New("the application sends informational answers without end")
)

// exchange sends the request to the guest over HTTP/1.1 and carries the answer
// back. The error says that there is none to carry; then nothing of one has been
// sent to the client.
func (p *Proxy) exchange(s *stream, r *http.Request) error {
	e := &exchange{proxy: p, stream: s, request: r, pool: s.guest.pool(s.dest.Port)}
	// Whoever panics on the way leaves no connection behind.
	defer func() {
		if e.pending {
			e.abandon()
		}
	}()
	for fresh := false; ; fresh = true {
		c, err := e.pool.get(s.ctx, s.hop, fresh)
		if err != nil {
			return err
		}
		e.conn, e.pending = c, true
		res, err := e.roundTrip() //nolint:bodyclose // its end settles what becomes of the connection, which deliver does
		if err == nil {
			e.pending = false // deliver sees to it
			e.deliver(res)
			return nil
		}
		stale := c.reused && !c.received && s.ctx.Err() == nil
		e.abandon()
		e.pending = false
		// An application may close an idle connection at the moment at which a
		// request goes out on it. It has not been looked at then.
		if !stale || !replayable(r) {
			return err
		}
	}
}

// replayable reports whether a request may be sent a second time although it is
// not known whether it arrived.
func replayable(r *http.Request) bool {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		return r.ContentLength == 0
	}
	return false
}

// exchange is one request and its answer on one connection to the guest.
type exchange struct {
	proxy   *Proxy
	stream  *stream
	request *http.Request
	pool    *pool

	conn      *upstream
	pending   bool          // the connection is nobody else's to see to
	watch     func() bool   // ends the watch of the client's context
	uploading chan struct{} // closed when the body has been sent; nil without one
}

// roundTrip sends the request and reads the header of the answer.
func (e *exchange) roundTrip() (*http.Response, error) {
	c, s, r := e.conn, e.stream, e.request
	c.received = false
	e.watch = context.AfterFunc(s.ctx, c.interrupt)
	if err := writeHeader(c.bw, s, r); err != nil {
		return nil, err
	}
	if s.upload == nil || s.extended { // what a WebSocket has to say comes later
		if err := c.bw.Flush(); err != nil {
			return nil, err
		}
	} else if !expectsContinue(r) {
		e.startUpload() // flushes
	} else if err := c.bw.Flush(); err != nil {
		return nil, err
	} else if early, err := e.awaitContinue(); early != nil || err != nil {
		return early, err
	}
	return e.readAnswer()
}

// readAnswer reads answers until a final one comes.
func (e *exchange) readAnswer() (*http.Response, error) {
	for range maxInformational {
		res, err := e.readHeader()
		if err != nil {
			return nil, err
		}
		switch {
		case res.StatusCode == http.StatusSwitchingProtocols:
			if e.stream.upgrade == "" {
				return nil, errUnaskedUpgrade
			}
			return res, nil
		case res.StatusCode >= 200:
			return res, nil
		}
		e.inform(res)
	}
	return nil, errTooManyInterims
}

func (e *exchange) readHeader() (*http.Response, error) {
	c := e.conn
	c.budget = maxResponseHeader
	request := e.request
	if e.stream.extended {
		request = &http.Request{Method: e.stream.method} // the answer to a CONNECT has no body
	}
	res, err := http.ReadResponse(c.br, request)
	c.budget = -1
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err == nil && res.StatusCode < 100 {
		return nil, errNoStatus // net/http panics when it is to send such a one
	}
	return res, err
}

// inform passes an informational answer on.
func (e *exchange) inform(res *http.Response) {
	if e.request.ProtoAtLeast(1, 1) {
		h := e.stream.Header()
		copyAnswerHeader(h, res)
		delete(h, "Content-Length") // RFC 9110, 8.6: there is none
		e.stream.WriteHeader(res.StatusCode)
		for k := range res.Header {
			delete(h, k)
		}
	}
}

func expectsContinue(r *http.Request) bool {
	return headerHasToken(r.Header, "Expect", "100-continue")
}

// awaitContinue waits until the guest wants the body. A final answer that comes
// instead is returned: the body is not wanted.
func (e *exchange) awaitContinue() (*http.Response, error) {
	c := e.conn
	_ = c.SetReadDeadline(time.Now().Add(continueTimeout)) // fails only on a closed connection, as the read will
	_, err := c.br.Peek(1)
	if !c.interrupted.Load() {
		_ = c.SetReadDeadline(time.Time{}) // likewise
	}
	if c.interrupted.Load() {
		return nil, context.Canceled
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		e.startUpload()
		return nil, nil
	}
	for range maxInformational {
		res, err := e.readHeader()
		if err != nil || res.StatusCode >= 200 || res.StatusCode == http.StatusSwitchingProtocols {
			return res, err
		}
		if res.StatusCode == http.StatusContinue {
			e.startUpload()
			return nil, nil
		}
		e.inform(res)
	}
	return nil, errTooManyInterims
}

// startUpload sends the body while the answer is awaited: an application may
// answer before it has read all, and may read all before it answers.
func (e *exchange) startUpload() {
	e.uploading = make(chan struct{})
	go func() {
		defer close(e.uploading)
		err := e.sendBody()
		if err != nil && e.stream.upload.broken.Load() {
			// The client's fault: no end of the request will come, and the guest
			// must not wait for it.
			e.conn.interrupt()
		}
		// A guest that reads no more may have an answer for us all the same.
	}()
}

func (e *exchange) sendBody() error {
	r, w := e.request, &uploadWriter{bw: e.conn.bw}
	defer w.holdHeader()()
	if r.ContentLength >= 0 {
		return e.copyUpload(w, w)
	}
	chunked := httputil.NewChunkedWriter(w)
	if err := e.copyUpload(chunked, w); err != nil {
		return err
	}
	if err := chunked.Close(); err != nil { // the last chunk, without the line that ends the trailers
		return err
	}
	if err := applicationTrailer(r.Trailer).Write(w); err != nil {
		return err
	}
	if _, err := io.WriteString(w, "\r\n"); err != nil {
		return err
	}
	return w.flush()
}

// copyUpload copies what the client sends, as it comes. What comes with the end is
// left to be flushed with the end, where that is framed.
func (e *exchange) copyUpload(to io.Writer, w *uploadWriter) error {
	buf := e.proxy.buffers.Get()
	defer e.proxy.buffers.Put(buf)
	for {
		n, err := e.stream.upload.Read(buf)
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF) && e.request.ContentLength < 0:
			return nil
		case errors.Is(err, io.EOF):
			return w.flush()
		case err != nil:
			return err
		}
		if err := w.flush(); err != nil {
			return err
		}
	}
}

// headerDelay is how long the header of a request waits for the first piece of its
// body, to go out with it: most bodies are there already.
const headerDelay = 2 * time.Millisecond

// uploadWriter writes a request's body behind its header.
type uploadWriter struct {
	mu sync.Mutex // the header may be sent by a timer
	bw *bufio.Writer
}

// holdHeader has the header sent when the body is late. What it returns ends that.
func (w *uploadWriter) holdHeader() (stop func()) {
	ended := false
	late := time.AfterFunc(headerDelay, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if !ended { // the connection may carry another request by then
			_ = w.bw.Flush() // an error stays, and comes up again
		}
	})
	return func() {
		late.Stop()
		w.mu.Lock()
		defer w.mu.Unlock()
		ended = true
	}
}

func (w *uploadWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.bw.Write(b)
}

func (w *uploadWriter) flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.bw.Flush()
}

// deliver carries an answer to the client and settles what becomes of the
// connection.
func (e *exchange) deliver(res *http.Response) {
	c, s := e.conn, e.stream
	if s.isAborted() { // while the guest answered: the client is told, not cut off
		e.abandon()
		s.fail(e.request, notFound(s.dest))
		return
	}
	if res.StatusCode == http.StatusSwitchingProtocols {
		e.upgrade(res)
		return
	}
	if s.extended && res.StatusCode < 300 {
		// To the client a success would say that the WebSocket is open.
		e.abandon()
		s.fail(e.request, notAnswered(s.dest))
		return
	}
	complete := false
	defer func() {
		if complete && e.settle() && !res.Close {
			e.pool.put(c)
		} else {
			e.abandon()
		}
	}()
	s.respond(res, source{body: res.Body, buffered: c.br.Buffered})
	complete = true
}

// settle ends what an answered request still does; it reports whether the
// connection is as good as new.
func (e *exchange) settle() bool {
	switch {
	case e.stream.upload == nil || e.stream.extended:
	case e.uploading == nil, !e.stream.upload.complete.Load():
		return false // the guest waits for the rest of this request, or for all of its body
	default:
		select {
		case <-e.uploading:
		default:
			if !e.awaitUpload() {
				return false
			}
		}
	}
	return e.watch() && !e.conn.interrupted.Load()
}

// settleTimeout is how long a guest that has answered may take to read what is left of
// the request.
const settleTimeout = 100 * time.Millisecond

// awaitUpload waits for the end of an upload whose answer has been delivered. A guest
// that reads no more must hold up neither the answer nor the client.
func (e *exchange) awaitUpload() bool {
	e.stream.flush()
	late := time.NewTimer(settleTimeout)
	defer late.Stop()
	select {
	case <-e.uploading:
		return true
	case <-late.C:
		return false
	}
}

// abandon closes the connection and waits for the upload to end.
func (e *exchange) abandon() {
	if e.watch != nil {
		e.watch()
	}
	e.conn.close()
	if e.uploading == nil {
		return
	}
	select {
	case <-e.uploading:
		return
	default:
	}
	if !e.stream.upload.complete.Load() {
		// It may wait for a client that sends nothing. The client has its answer, or
		// gets it now, on a connection that carries no further request.
		e.stream.stopUpload()
	}
	<-e.uploading
}

// writeHeader writes the request line and the header of a request to a guest.
func writeHeader(w *bufio.Writer, s *stream, r *http.Request) error {
	w.WriteString(s.method)
	w.WriteByte(' ')
	w.WriteString(s.hopPrefix)
	w.WriteString(s.target.path)
	if s.target.hasQuery {
		w.WriteByte('?')
		w.WriteString(s.target.query)
	}
	w.WriteString(" HTTP/1.1\r\nHost: ")
	w.WriteString(s.host)
	w.WriteString("\r\n")
	s.eachHeader(r, func(name, value string) {
		w.WriteString(name)
		w.WriteString(": ")
		w.WriteString(value)
		w.WriteString("\r\n")
	})
	switch {
	case s.extended:
	case s.upload == nil:
		if r.Method == http.MethodPost || r.Method == http.MethodPut || r.Method == http.MethodPatch {
			w.WriteString("Content-Length: 0\r\n")
		}
	case r.ContentLength >= 0:
		w.WriteString("Content-Length: ")
		w.WriteString(strconv.FormatInt(r.ContentLength, 10))
		w.WriteString("\r\n")
	default:
		w.WriteString("Transfer-Encoding: chunked\r\n")
		for name := range applicationTrailer(r.Trailer) {
			w.WriteString("Trailer: ")
			w.WriteString(name)
			w.WriteString("\r\n")
		}
	}
	_, err := w.WriteString("\r\n") // the first error of all stays
	return err
}
