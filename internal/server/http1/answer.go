package http1

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/net/http/httpguts"
)

// answer is the http.ResponseWriter of a connection's current request.
type answer struct {
	c      *conn
	bw     *bufio.Writer
	r      *http.Request
	header http.Header
	served int // requests so far

	status     int
	chunked    bool
	bodyless   bool        // whatever is written of a body is not sent
	left       int64       // bytes that are due; < 0: no length was told
	halfClose  bool        // the end of what the client sends does not mean that it has gone: it said that nothing follows
	close      bool        // the connection ends with this answer
	ending     atomic.Bool // it has been given up by another goroutine; as close
	failed     bool        // the client cannot be written to, or the handler's answer is wrong
	clientGone atomic.Bool
}

func (a *answer) begin(c *conn, r *http.Request) {
	a.c, a.r = c, r
	if a.header == nil {
		a.header = make(http.Header, 16)
	}
	a.served++
	a.status, a.chunked, a.bodyless, a.left, a.failed = 0, false, r.Method == http.MethodHead, -1, false
	a.close, a.halfClose = r.Close, r.Close
	a.bw = writers.Get().(*bufio.Writer)
	a.bw.Reset(c.rw)
}

// release gives back what an idle connection does not need.
func (a *answer) release() {
	a.bw.Reset(io.Discard)
	writers.Put(a.bw)
	a.bw, a.r = nil, nil
	clear(a.header)
}

// breakOff ends an answer that its handler has given up. Where its end would be that
// of the connection, the client must see another one.
func (a *answer) breakOff() {
	if a.status != 0 && a.left < 0 && !a.chunked && !a.bodyless {
		if tcp, ok := a.c.raw.(interface{ SetLinger(int) error }); ok {
			_ = tcp.SetLinger(0) // fails only on a closed connection
			_ = a.c.raw.Close()  // beneath TLS, which would say a proper goodbye
		}
	}
}

func (a *answer) Header() http.Header { return a.header }

// WriteHeader implements http.ResponseWriter.
func (a *answer) WriteHeader(status int) {
	if a.status != 0 {
		return
	}
	if status < 200 {
		if status != http.StatusSwitchingProtocols && a.r.ProtoMinor > 0 {
			a.statusLine(status)
			a.writeHeader()
			a.Flush()
		}
		return
	}
	a.status = status
	h := a.header
	switch status {
	case http.StatusNoContent:
		delete(h, "Content-Length") // RFC 9110, 8.6
		a.bodyless = true
	case http.StatusNotModified:
		a.bodyless = true
	}
	if httpguts.HeaderValuesContainsToken(h["Connection"], "close") {
		a.close = true
	}
	delete(h, "Connection")
	delete(h, "Transfer-Encoding")
	if length := h["Content-Length"]; len(length) > 0 {
		n, err := strconv.ParseInt(length[0], 10, 64)
		if err != nil || n < 0 {
			delete(h, "Content-Length")
		} else {
			h["Content-Length"], a.left = length[:1], n
		}
	}
	a.statusLine(status)
	if h["Date"] == nil {
		a.bw.WriteString("Date: ")
		a.bw.Write(time.Now().UTC().AppendFormat(a.bw.AvailableBuffer(), http.TimeFormat))
		a.bw.WriteString("\r\n")
	}
	switch {
	case a.left >= 0 || a.bodyless:
	case a.r.ProtoMinor > 0:
		a.chunked = true
		a.bw.WriteString("Transfer-Encoding: chunked\r\n")
	default:
		a.close = true // the body ends with the connection
	}
	if a.close {
		a.bw.WriteString("Connection: close\r\n")
	}
	a.writeHeader()
}

func (a *answer) statusLine(status int) {
	a.bw.WriteString("HTTP/1.1 ")
	a.bw.Write(strconv.AppendInt(a.bw.AvailableBuffer(), int64(status), 10))
	a.bw.WriteByte(' ')
	if text := http.StatusText(status); text != "" {
		a.bw.WriteString(text)
	} else {
		a.bw.WriteString("status code ")
		a.bw.Write(strconv.AppendInt(a.bw.AvailableBuffer(), int64(status), 10))
	}
	a.bw.WriteString("\r\n")
}

// lineBreaks cannot be in a value that is written.
var lineBreaks = strings.NewReplacer("\n", " ", "\r", " ")

// writeHeader writes the lines and the empty one.
func (a *answer) writeHeader() {
	for name, values := range a.header {
		if strings.HasPrefix(name, http.TrailerPrefix) || !httpguts.ValidHeaderFieldName(name) {
			continue
		}
		for _, value := range values {
			a.writeLine(name, value)
		}
	}
	a.bw.WriteString("\r\n")
}

func (a *answer) writeLine(name, value string) {
	if strings.ContainsAny(value, "\r\n") {
		value = lineBreaks.Replace(value)
	}
	a.bw.WriteString(name)
	a.bw.WriteString(": ")
	a.bw.WriteString(value)
	a.bw.WriteString("\r\n")
}

var errTooMuch = errors.New("more was written than the Content-Length says")

// Write implements http.ResponseWriter.
func (a *answer) Write(b []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	if a.bodyless || len(b) == 0 {
		return len(b), nil
	}
	if a.left >= 0 {
		if int64(len(b)) > a.left {
			a.failed = true
			return 0, errTooMuch
		}
		a.left -= int64(len(b))
	}
	if a.chunked {
		a.bw.Write(strconv.AppendInt(a.bw.AvailableBuffer(), int64(len(b)), 16))
		a.bw.WriteString("\r\n")
	}
	n, err := a.bw.Write(b)
	if a.chunked && err == nil {
		_, err = a.bw.WriteString("\r\n")
	}
	if err != nil {
		a.failed = true
	}
	return n, err
}

// Flush implements http.Flusher.
func (a *answer) Flush() { _ = a.FlushError() }

// FlushError is for http.ResponseController.
func (a *answer) FlushError() error {
	err := a.bw.Flush()
	if err != nil {
		a.failed = true
	}
	return err
}

// SetReadDeadline is for http.ResponseController. There is nothing to read.
func (a *answer) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline is for http.ResponseController. It stays for the connection.
func (a *answer) SetWriteDeadline(t time.Time) error {
	a.ending.Store(true)
	return a.c.rw.SetWriteDeadline(t)
}

// finish ends the answer; it reports whether the connection can carry another one.
func (a *answer) finish() bool {
	if a.status == 0 {
		a.header["Content-Length"] = []string{"0"}
		a.WriteHeader(http.StatusOK)
	}
	if a.left > 0 && !a.bodyless {
		a.Flush()
		return false // broken off, as the client will see
	}
	if a.chunked && !a.bodyless {
		a.bw.WriteString("0\r\n")
		a.writeTrailer()
		a.bw.WriteString("\r\n")
	}
	return a.FlushError() == nil && !a.failed && !a.close && !a.ending.Load()
}

// writeTrailer writes what was announced, and what has the prefix of those that
// were not.
func (a *answer) writeTrailer() {
	for _, line := range a.header["Trailer"] {
		for name := range strings.SplitSeq(line, ",") {
			name = http.CanonicalHeaderKey(strings.TrimSpace(name))
			if !httpguts.ValidTrailerHeader(name) {
				continue
			}
			for _, value := range a.header[name] {
				a.writeLine(name, value)
			}
		}
	}
	for name, values := range a.header {
		name, ok := strings.CutPrefix(name, http.TrailerPrefix)
		if !ok || !httpguts.ValidTrailerHeader(name) {
			continue
		}
		for _, value := range values {
			a.writeLine(name, value)
		}
	}
}
