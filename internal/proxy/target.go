package proxy

import (
	"net/http"
	"net/url"
	"path"
	"strings"
)

// requestTarget is the target of a request as the client wrote it.
type requestTarget struct {
	path     string // still escaped; begins with "/" or is "*"
	query    string
	hasQuery bool // there was a "?", even if nothing came after it
}

// rawTarget takes the target from the request line, because http.Request.URL has
// been through decoding that does not always restore the same bytes. It reports
// false for a target that would not be one word of a request line.
func rawTarget(r *http.Request) (requestTarget, bool) {
	uri := r.RequestURI
	if connects(r) {
		return requestTarget{path: "/"}, true // it names a host and nothing there
	}
	if i := strings.Index(uri, "://"); i > 0 && r.ProtoMajor == 1 && !strings.ContainsAny(uri[:i], "/?") {
		// Absolute form; the authority is in r.Host already.
		rest := uri[i+len("://"):]
		uri = "/"
		if j := strings.IndexAny(rest, "/?"); j >= 0 {
			uri = rest[j:]
		}
		if uri[0] == '?' {
			uri = "/" + uri
		}
	}
	var t requestTarget
	t.path, t.query, t.hasQuery = strings.Cut(uri, "?")
	// HTTP/2 carries the target in a field of its own, so spaces in it get this
	// far; on HTTP/1.1 they would end the target early.
	for _, c := range []byte(uri) {
		if c <= ' ' || c == 0x7f {
			return t, false
		}
	}
	return t, strings.HasPrefix(t.path, "/") || (t.path == "*" && r.Method == http.MethodOptions)
}

// agentRoutes are served by the guest agent for its host alone.
var agentRoutes = map[string]bool{
	"init": true, "freeze": true, "unfreeze": true, "collapse": true,
	"fsfreeze": true, "fsthaw": true, "upgrade": true, "logs": true, "poweroff": true, "sync": true,
}

// agentInternal reports whether any reading of an escaped path leads to one of
// the guest agent's internal routes. It goes further than any router does
// (repeated decoding, dot segments, empty segments, backslashes, parameters,
// letter case): no public route looks like an internal one under any of these.
func agentInternal(escaped string) bool {
	p := escaped
	for range 8 {
		if agentRoutes[firstSegment(p)] {
			return true
		}
		decoded := lenientUnescape(p)
		if decoded == p {
			return false
		}
		p = decoded
	}
	return true // nobody escapes a path eight times for a good reason
}

func firstSegment(p string) string {
	p = strings.ReplaceAll(p, `\`, "/")
	p, _, _ = strings.Cut(path.Clean("/" + p)[1:], "/")
	p, _, _ = strings.Cut(p, ";")
	return strings.ToLower(strings.TrimSpace(strings.Trim(p, "\x00")))
}

// lenientUnescape decodes what is a proper escape and leaves the rest alone.
func lenientUnescape(s string) string {
	if !strings.Contains(s, "%") {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			if c, err := url.PathUnescape(s[i : i+3]); err == nil {
				b.WriteString(c)
				i += 2
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
