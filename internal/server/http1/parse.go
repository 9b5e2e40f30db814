package http1

import (
	"bytes"
	"net/http"
	"net/textproto"
	"net/url"
	"strings"

	"golang.org/x/net/http/httpguts"
)

type verdict int

const (
	headIncomplete verdict = iota
	headGood
	headForeign // not for us to judge or to serve
)

var headEnd = []byte("\r\n\r\n")

// parse reads the header at the start of buf. It takes only what RFC 9112 lets a
// client send, in its strictest reading, and no request with a body.
func (c *conn) parse() (*http.Request, int, verdict) {
	i := bytes.Index(c.buf, headEnd)
	if i < 0 {
		// A line that ends without CR is not for us, and may never get to an end
		// that is looked for.
		if bytes.Count(c.buf, []byte("\n")) != bytes.Count(c.buf, []byte("\r\n")) {
			return nil, 0, headForeign
		}
		return nil, 0, headIncomplete
	}
	end := i + len(headEnd)
	head := string(c.buf[:i+2]) // every line with its end
	line, rest, _ := strings.Cut(head, "\r\n")
	method, target, ok := requestLine(line)
	if !ok {
		return nil, 0, headForeign
	}
	r := &http.Request{
		Method: method, RequestURI: target, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Body: http.NoBody, RemoteAddr: c.remote, TLS: c.state,
	}
	if strings.HasSuffix(line, "0") {
		r.Proto, r.ProtoMinor, r.Close = "HTTP/1.0", 0, true
	}
	if r.Header, ok = headers(rest); !ok || !simple(r) {
		return nil, 0, headForeign
	}
	var err error
	if r.URL, err = url.ParseRequestURI(target); err != nil {
		return nil, 0, headForeign
	}
	return r.WithContext(c.ctx), end, headGood
}

// requestLine reads a line of a method without a body, a target in origin form and
// HTTP/1.0 or 1.1.
func requestLine(line string) (method, target string, ok bool) {
	method, rest, _ := strings.Cut(line, " ")
	target, version, _ := strings.Cut(rest, " ")
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodDelete:
	default:
		return "", "", false
	}
	if version != "HTTP/1.1" && version != "HTTP/1.0" || !strings.HasPrefix(target, "/") {
		return "", "", false
	}
	for _, b := range []byte(target) {
		if b <= ' ' || b >= 0x7f {
			return "", "", false
		}
	}
	return method, target, true
}

// headers reads header lines.
func headers(lines string) (http.Header, bool) {
	n := strings.Count(lines, "\r\n")
	if n > 128 {
		return nil, false
	}
	h := make(http.Header, n)
	values := make([]string, n) // one allocation for all
	for i := range n {
		line, rest, _ := strings.Cut(lines, "\r\n")
		lines = rest
		name, value, ok := strings.Cut(line, ":")
		if !ok || !httpguts.ValidHeaderFieldName(name) {
			return nil, false // a folded line is among these: its name begins with a space
		}
		value = strings.Trim(value, " \t")
		if !httpguts.ValidHeaderFieldValue(value) {
			return nil, false
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		if had := h[name]; had != nil {
			h[name] = append(had, value)
			continue
		}
		values[i] = value
		h[name] = values[i : i+1 : i+1]
	}
	return h, true
}

// simple reports whether a request has no body and wants nothing special, and sets
// what its header says of host and connection.
func simple(r *http.Request) bool {
	for _, name := range []string{"Content-Length", "Transfer-Encoding", "Trailer", "Expect", "Upgrade", "Proxy-Connection"} {
		if r.Header[name] != nil {
			return false
		}
	}
	host := r.Header["Host"]
	if len(host) != 1 || host[0] == "" || !httpguts.ValidHostHeader(host[0]) {
		return false
	}
	r.Host = host[0]
	delete(r.Header, "Host")
	switch connection := r.Header["Connection"]; {
	case len(connection) == 0, len(connection) == 1 && strings.EqualFold(connection[0], "keep-alive"):
	case len(connection) == 1 && strings.EqualFold(connection[0], "close"):
		r.Close = true
	default:
		return false
	}
	return true
}
