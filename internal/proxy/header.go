package proxy

import (
	"crypto/rand"
	"encoding/base64"
	"net"
	"net/http"
	"strings"
)

// hopByHop are the headers that are between two neighbours and go no further (RFC
// 9110, 7.6.1, and what older implementations send).
var hopByHop = map[string]bool{
	"Connection": true, "Keep-Alive": true, "Proxy-Connection": true, "Proxy-Authenticate": true,
	"Proxy-Authorization": true, "Te": true, "Trailer": true, "Transfer-Encoding": true, "Upgrade": true,
}

// eachHeader calls f for each header line that the guest gets, without what frames
// the body.
func (s *stream) eachHeader(r *http.Request, f func(name, value string)) {
	named := connectionOptions(r.Header)
	for name, values := range r.Header {
		// HTTP/2 may have a Host beside the authority, which is the host.
		if name[0] == ':' || hopByHop[name] || name == "Content-Length" || name == "Host" || named[name] {
			continue
		}
		if !s.trusted {
			values = s.forApplication(name, values)
		}
		for _, value := range values {
			f(name, strings.Trim(value, " \t")) // HTTP/2 lets them through
		}
	}
	if s.extended {
		// HTTP/2 has no use for it (RFC 8441, 5), and the guest answers to it.
		key := make([]byte, 16)
		rand.Read(key) // never fails
		f("Sec-Websocket-Key", base64.StdEncoding.EncodeToString(key))
	}
	if headerHasToken(r.Header, "Te", "trailers") {
		f("Te", "trailers")
	}
	if s.upgrade != "" {
		f("Connection", "Upgrade")
		f("Upgrade", s.upgrade)
	}
	if s.trusted {
		return
	}
	if ip, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		f("X-Forwarded-For", ip)
	}
	f("X-Forwarded-Host", r.Host)
	if r.TLS != nil {
		f("X-Forwarded-Proto", "https")
	} else {
		f("X-Forwarded-Proto", "http")
	}
	if s.dest.Prefix != "" {
		f("X-Forwarded-Prefix", s.dest.Prefix)
	}
}

// connectionOptions are the names that Connection declares to be between two
// neighbours; nil for none. What routes and guards a request cannot be declared
// away.
func connectionOptions(h http.Header) map[string]bool {
	var named map[string]bool
	for _, line := range h["Connection"] {
		for option := range strings.SplitSeq(line, ",") {
			option = strings.TrimSpace(option)
			if option == "" || strings.EqualFold(option, "close") || strings.EqualFold(option, "keep-alive") || strings.EqualFold(option, "upgrade") {
				continue
			}
			if named == nil {
				named = make(map[string]bool)
			}
			named[http.CanonicalHeaderKey(option)] = true
		}
	}
	return named
}

// headerHasToken reports whether a list header has the token, in any letter case.
func headerHasToken(h http.Header, name, token string) bool {
	for _, line := range h[name] {
		for item := range strings.SplitSeq(line, ",") {
			if strings.EqualFold(strings.TrimSpace(item), token) {
				return true
			}
		}
	}
	return false
}

// upgradeOf returns the protocol that a request asks to switch to, empty for none.
// HTTP is never switched to HTTP (RFC 9113 took h2c upgrades out, RFC 2817 is
// dead): a client would have a connection to the application that nothing looks
// into any more. The guest agent switches to nothing.
func upgradeOf(r *http.Request, d Destination) string {
	switch {
	case d.Port == AgentPort:
		return ""
	case isExtendedConnect(r):
		return "websocket"
	case r.ProtoMajor != 1 || r.ProtoMinor < 1 || r.ContentLength != 0 || !headerHasToken(r.Header, "Connection", "upgrade"):
		return ""
	}
	protocols := r.Header["Upgrade"]
	if len(protocols) != 1 {
		return ""
	}
	protocol := strings.ToLower(protocols[0])
	if strings.ContainsAny(protocol, ", \t") || protocol == "h2c" || protocol == "h2" ||
		strings.HasPrefix(protocol, "http") || strings.HasPrefix(protocol, "tls") {
		return ""
	}
	return protocols[0]
}

// isExtendedConnect reports whether a request asks for a WebSocket over HTTP/2 (RFC
// 8441). net/http puts the pseudo-header among the others, where no client can.
func isExtendedConnect(r *http.Request) bool {
	return r.ProtoMajor == 2 && r.Method == http.MethodConnect && len(r.Header[":protocol"]) == 1 && r.Header[":protocol"][0] == "websocket"
}
