package proxy

import (
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// pathForm is where the path of a data-plane request begins that names its sandbox
// there: /proxy/{id}/{port}/….
const pathForm = "/proxy/"

// parsePath reads the sandbox out of an escaped path of the path form. The prefix
// of the destination is what the application does not see.
func parsePath(escaped string) (Destination, error) {
	rest, ok := strings.CutPrefix(escaped, pathForm)
	if !ok {
		return Destination{}, errInvalidPath
	}
	id, rest, _ := strings.Cut(rest, "/")
	port, _, _ := strings.Cut(rest, "/")
	d, err := parseDestination(id, port)
	d.Prefix = pathForm + id + "/" + port
	return d, err
}

// origin tells where an application is, as its client sees it and as it may see
// itself.
type origin struct {
	dest Destination
	addr netip.AddrPort // at which the proxy reaches it
	host string         // the Host header of the client's request
	mask string         // that of the application's, where it is another one; else empty
}

// rewriteAnswer puts right what an application says about where it is: it does not
// know of the prefix of its path, and may name an address that exists only inside
// the sandbox or between it and the proxy.
func (s *stream) rewriteAnswer() {
	if s.dest.Port == AgentPort || s.trusted {
		return // the guest agent sends nobody anywhere; what goes to a front, that rewrites
	}
	h := s.Header()
	if s.dest.Prefix != "" {
		// All applications share the origin: none may take it over, nor empty it.
		h.Del("Service-Worker-Allowed")
		h.Del("Clear-Site-Data")
	}
	o := origin{s.dest, s.addr, s.clientHost, s.mask}
	for _, name := range []string{"Location", "Content-Location"} {
		for i, value := range h[name] {
			h[name][i] = o.rewriteURL(value)
		}
	}
	for i, value := range h["Refresh"] {
		h["Refresh"][i] = o.rewriteRefresh(value)
	}
	for i, value := range h["Set-Cookie"] {
		h["Set-Cookie"][i] = o.rewriteCookie(value)
	}
}

// rewriteURL returns the reference as the client has to have it. What is relative
// to the current path, or leads away from the sandbox, stays as it is.
func (o origin) rewriteURL(ref string) string {
	scheme, rest, absolute := cutScheme(ref)
	switch {
	case absolute && scheme != "http" && scheme != "https" && scheme != "":
		return ref
	case !absolute && strings.HasPrefix(ref, "/"):
		return o.prefixed(ref)
	case !absolute:
		return ref
	}
	// The authority ends where RFC 3986, 3.2 says, and where browsers think so.
	end := strings.IndexAny(rest, `/\?#`)
	if end < 0 {
		end = len(rest)
	}
	authority, target := rest[:end], rest[end:]
	authority = authority[strings.LastIndexByte(authority, '@')+1:]
	if !strings.HasPrefix(target, "/") {
		target = "/" + target
	}
	if strings.EqualFold(authority, o.host) {
		if o.dest.Prefix == "" {
			return ref
		}
		return o.prefixed(target)
	}
	port, ok := o.internal(scheme, authority)
	switch {
	case !ok:
		return ref
	case port == o.dest.Port:
		return o.prefixed(target)
	}
	return o.neighbour(port) + target
}

// cutScheme takes "scheme://" or "//" off a reference.
func cutScheme(ref string) (scheme, rest string, ok bool) {
	if rest, ok := strings.CutPrefix(ref, "//"); ok {
		return "", rest, true
	}
	scheme, rest, ok = strings.Cut(ref, "://")
	if !ok || strings.ContainsAny(scheme, "/?#") {
		return "", "", false
	}
	return strings.ToLower(scheme), rest, true
}

// prefixed returns a path and what follows it below the prefix, unless it is there
// already: some applications are told of their prefix.
func (o origin) prefixed(target string) string {
	if rest, ok := strings.CutPrefix(target, o.dest.Prefix); o.dest.Prefix != "" && ok &&
		(rest == "" || strings.ContainsAny(rest[:1], "/?#")) {
		return target
	}
	if o.dest.Prefix == "" && strings.HasPrefix(target, "//") {
		// By itself this would name a host.
		return "/." + target
	}
	return o.dest.Prefix + target
}

// internal reports whether an authority is of this sandbox, by an address that is
// of no use to a client, and of which port.
func (o origin) internal(scheme, authority string) (uint16, bool) {
	implied := "80"
	if scheme == "https" {
		implied = "443"
	}
	host, text, err := net.SplitHostPort(authority)
	if err != nil {
		host, text = strings.Trim(authority, "[]"), implied
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return 0, false
	}
	host = strings.ToLower(host)
	if o.mask != "" && host == hostname(o.mask) {
		return o.masked(uint16(port), text == implied)
	}
	if host == "localhost" {
		return uint16(port), true
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return 0, false
	}
	addr = addr.Unmap()
	return uint16(port), addr.IsLoopback() || addr.IsUnspecified() || addr.IsLinkLocalUnicast() || addr == o.addr.Addr()
}

// masked reports which port of this sandbox the mask's name is with a port; implied,
// if the scheme's own. A mask that ends in the application's port speaks for the
// other ports too; any other is the application alone.
func (o origin) masked(port uint16, implied bool) (uint16, bool) {
	_, own, err := net.SplitHostPort(o.mask)
	switch text := strconv.Itoa(int(port)); {
	case err == nil && own == text, err != nil && (implied || port == o.dest.Port):
		return o.dest.Port, true
	case err == nil && own == strconv.Itoa(int(o.dest.Port)):
		return port, true
	}
	return 0, false
}

// neighbour returns how the client reaches another port of the same sandbox.
func (o origin) neighbour(port uint16) string {
	number := strconv.Itoa(int(port))
	if o.dest.Prefix != "" {
		return pathForm + o.dest.SandboxID + "/" + number
	}
	// The host begins with the port, unless routing headers have named it.
	if rest, ok := strings.CutPrefix(o.host, strconv.Itoa(int(o.dest.Port))+"-"); ok {
		return "//" + number + "-" + rest
	}
	return ""
}

// rewriteRefresh rewrites the URL in "5; url=/next".
func (o origin) rewriteRefresh(value string) string {
	at := strings.Index(strings.ToLower(value), "url=")
	if at < 0 {
		return value
	}
	at += len("url=")
	ref := strings.TrimSpace(value[at:])
	if n := len(ref); n >= 2 && (ref[0] == '"' || ref[0] == '\'') && ref[n-1] == ref[0] {
		return value[:at] + ref[:1] + o.rewriteURL(ref[1:n-1]) + ref[:1]
	}
	return value[:at] + o.rewriteURL(ref)
}

// rewriteCookie makes a cookie one of this application alone: one for the whole
// domain would go to other sandboxes, or to none if the domain is an address that
// the client does not know. In the path form its path gets the prefix.
func (o origin) rewriteCookie(cookie string) string {
	parts := strings.Split(cookie, ";")
	name, _, _ := strings.Cut(strings.TrimSpace(parts[0]), "=")
	kept := parts[:1]
	for _, part := range parts[1:] {
		key, value, _ := strings.Cut(strings.TrimSpace(part), "=")
		switch strings.ToLower(strings.TrimSpace(key)) {
		case "domain":
			if !strings.EqualFold(strings.TrimPrefix(strings.TrimSpace(value), "."), hostname(o.host)) || o.dest.Prefix != "" {
				continue
			}
		case "path":
			// A cookie with this name must have the path "/" (RFC 6265bis, 4.1.3.2).
			if o.dest.Prefix != "" && !strings.HasPrefix(name, "__Host-") {
				part = " Path=" + o.cookiePath(strings.TrimSpace(value))
			}
		}
		kept = append(kept, part)
	}
	return strings.Join(kept, ";")
}

func (o origin) cookiePath(path string) string {
	if !strings.HasPrefix(path, "/") {
		path = "/" // what clients make of it (RFC 6265, 5.2.4)
	}
	return o.prefixed(path)
}

// withSlash answers a request for the prefix itself: relative references of the
// page would lead to the sandbox's other ports.
func withSlash(w http.ResponseWriter, d Destination, t requestTarget) {
	to := url.URL{Path: d.Prefix + "/", RawQuery: t.query, ForceQuery: t.hasQuery}
	w.Header().Set("Location", to.String())
	w.WriteHeader(http.StatusPermanentRedirect)
}
