package proxy

import (
	"net/http"
	"strings"
)

// forApplication returns the values of a client's header as the application gets
// them; none of what the client said to the proxy alone, and of what only the
// proxy may say to the application.
func (s *stream) forApplication(name string, values []string) []string {
	switch {
	case name == "Cookie":
		return withoutLinkCookies(values)
	case name == "Origin" && s.mask != "" && len(values) == 1:
		return []string{s.maskedOrigin(values[0])}
	case name == HeaderTrafficToken, speaksForProxy(name):
		return nil
	}
	return values
}

// proxyHeaders are what applications take from the proxy before them, beside
// those that begin with "X-Forwarded-": where a request comes from and how it was
// addressed. They are ours alone, so that nobody can pretend to come from elsewhere
// or to have asked for something else.
var proxyHeaders = map[string]bool{
	"Forwarded": true, "X-Real-Ip": true,
	"X-Original-Url": true, "X-Original-Host": true, "X-Rewrite-Url": true, "X-Http-Host-Override": true,
}

// speaksForProxy reports whether a header is the proxy's to set. Gateways of many
// languages (CGI, WSGI) make the same name of "-" and "_".
func speaksForProxy(name string) bool {
	if strings.IndexByte(name, '_') >= 0 {
		name = http.CanonicalHeaderKey(strings.ReplaceAll(name, "_", "-"))
	}
	return strings.HasPrefix(name, "X-Forwarded-") || proxyHeaders[name]
}

// maskedOrigin makes requests of an application's own pages come from the origin
// that the application takes for its own: servers refuse WebSockets and forms
// whose Origin is not their Host. Origins of others stay what they are.
func (s *stream) maskedOrigin(origin string) string {
	scheme, authority, ok := strings.Cut(origin, "://")
	if ok && (scheme == "http" || scheme == "https") && strings.EqualFold(authority, s.clientHost) {
		return scheme + "://" + s.mask
	}
	return origin
}
