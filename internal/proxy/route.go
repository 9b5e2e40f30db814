package proxy

import (
	"net/http"
	"strconv"
	"strings"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// Headers that name the sandbox where the host does not.
const (
	HeaderSandboxID   = "E2b-Sandbox-Id"
	HeaderSandboxPort = "E2b-Sandbox-Port"
)

var (
	errInvalidHost = sandbox.Errorf(sandbox.ErrInvalid, "Invalid host: want {port}-{sandbox id}.{domain}")
	errInvalidPath = sandbox.Errorf(sandbox.ErrInvalid, "Invalid path: want /proxy/{sandbox id}/{port}/…")
	errInvalidID   = sandbox.Errorf(sandbox.ErrInvalid, "Invalid sandbox ID: want letters a-z and digits")
	errInvalidPort = sandbox.Errorf(sandbox.ErrInvalid, "Invalid sandbox port: want 1 to 65535")
	errHeaders     = sandbox.Errorf(sandbox.ErrInvalid, "Invalid routing headers: want %s and %s, once each", HeaderSandboxID, HeaderSandboxPort)
)

// Destination is a port of a sandbox.
type Destination struct {
	SandboxID string
	Port      uint16
	Prefix    string // what the path form puts before the application's path; else empty
}

// Route decides whether a request is for a sandbox, and for which. An error (of
// kind ErrInvalid) means that it is a data-plane request which names none
// properly.
//
// Under the domain the host alone decides and routing headers are not looked at:
// "{port}-{id}[-{legacy}].{domain}" is a sandbox, "sandbox.{domain}" is the host
// that all sandboxes share and takes routing headers, "api.{domain}" and the
// domain itself are not ours, every other name is an error.
//
// Any other host (localhost, an IP address, the machine's own name) cannot say
// which sandbox is meant, so there routing headers decide, if there are any, and
// else a path of the form "/proxy/{id}/{port}/…". It is not served on the
// platform's own names: an application's pages would share the API's origin.
// Without a domain a host of exactly the form "{port}-{id}.…" is a sandbox
// whatever its suffix is, which makes localhost and wildcard DNS services work
// without configuration.
//
// For the data plane of a host agent the path alone decides, see Config.Hop, and for
// tunnels, which have none, a target of the form "{port}-{id}:{port}".
//
// The host is that of the request target where the target has one, as RFC 9112,
// 3.2.2 wants it, else of the Host header; in HTTP/2 it is the authority. It is
// also what the application gets. The name that TLS was opened with plays no part:
// browsers use one connection for all hosts of a certificate.
func (p *Proxy) Route(r *http.Request) (Destination, bool, error) {
	if p.hop && connects(r) {
		d, err := parseLabel(hostname(r.Host))
		return d, true, err
	}
	if p.hop {
		d, err := parsePath(escapedPath(r))
		return d, true, err
	}
	d, ok, err := p.route(r)
	if ok && err == nil && !plainHost(r.Host) {
		return Destination{}, true, errInvalidHost
	}
	return d, ok, err
}

func (p *Proxy) route(r *http.Request) (Destination, bool, error) {
	host := hostname(r.Host)
	if label, ok := underDomain(host, p.domain); ok {
		switch label {
		case "api":
			return Destination{}, false, nil
		case "sandbox":
			return byHeadersOrPath(r)
		}
		d, err := parseLabel(label)
		return d, true, err
	}
	if p.domain == "" {
		label, _, dotted := strings.Cut(host, ".")
		if d, err := parseLabel(label); dotted && err == nil && len(d.SandboxID) == sandbox.IDLength {
			return d, true, nil
		}
	}
	if !hasHeaders(r) && (host == p.domain || !strings.HasPrefix(escapedPath(r), pathForm)) {
		return Destination{}, false, nil
	}
	return byHeadersOrPath(r)
}

func hasHeaders(r *http.Request) bool {
	return len(r.Header[HeaderSandboxID]) > 0 || len(r.Header[HeaderSandboxPort]) > 0
}

// byHeadersOrPath routes a request whose host says only that it is for a sandbox.
func byHeadersOrPath(r *http.Request) (d Destination, ok bool, err error) {
	if path := escapedPath(r); !hasHeaders(r) && strings.HasPrefix(path, pathForm) {
		d, err = parsePath(path)
	} else {
		d, err = parseHeaders(r.Header)
	}
	return d, true, err
}

func escapedPath(r *http.Request) string {
	target, _ := rawTarget(r)
	return target.path
}

// RouteError answers a request that Route refused: plain text, as clients know it.
func RouteError(w http.ResponseWriter, err error) {
	msg, ok := sandbox.Message(err)
	if !ok {
		msg = "Invalid request"
	}
	http.Error(w, msg, http.StatusBadRequest)
}

// underDomain returns what precedes ".{domain}" in host.
func underDomain(host, domain string) (string, bool) {
	if domain == "" {
		return "", false
	}
	rest, ok := strings.CutSuffix(host, domain)
	if !ok {
		return "", false
	}
	return strings.CutSuffix(rest, ".")
}

// parseLabel reads "{port}-{id}" or "{port}-{id}-{legacy}". The third part is the
// client id that old hosts end in; it means nothing.
func parseLabel(label string) (Destination, error) {
	parts := strings.Split(label, "-")
	if len(parts) != 2 && len(parts) != 3 {
		return Destination{}, errInvalidHost
	}
	if len(parts) == 3 && !validID(parts[2]) {
		return Destination{}, errInvalidHost
	}
	return parseDestination(parts[1], parts[0])
}

// parseHeaders reads the routing headers; the id may have a legacy client id too.
func parseHeaders(h http.Header) (Destination, error) {
	ids, ports := h[HeaderSandboxID], h[HeaderSandboxPort]
	if len(ids) != 1 || len(ports) != 1 {
		return Destination{}, errHeaders
	}
	id, legacy, found := strings.Cut(ids[0], "-")
	if found && !validID(legacy) {
		return Destination{}, errInvalidID
	}
	return parseDestination(id, ports[0])
}

func parseDestination(id, port string) (Destination, error) {
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || port[0] == '0' {
		return Destination{}, errInvalidPort
	}
	if !validID(id) {
		return Destination{}, errInvalidID
	}
	return Destination{SandboxID: id, Port: uint16(n)}, nil
}

// validID accepts more than sandbox.ParseID does: an id of the right alphabet but
// another length is simply not found, which is what clients expect.
func validID(id string) bool {
	if id == "" || len(id) > 63 {
		return false
	}
	for _, c := range []byte(id) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return false
		}
	}
	return true
}

// plainHost reports whether a Host is a name or address with or without a port. Of
// what more the syntax allows, some ends in pages and logs of applications.
func plainHost(host string) bool {
	const name = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._"
	rest := strings.TrimLeft(host, name)
	if address, found := strings.CutPrefix(host, "["); found {
		if rest, found = strings.CutPrefix(strings.TrimLeft(address, name+":%"), "]"); !found {
			return false
		}
	}
	port, found := strings.CutPrefix(rest, ":")
	return rest == "" || found && len(port) <= len("65535") && strings.Trim(port, "0123456789") == ""
}

// hostname returns the name in a Host header or domain: lower case, without
// port, brackets and the root's dot.
func hostname(hostport string) string {
	h := strings.ToLower(hostport)
	if strings.HasPrefix(h, "[") {
		h, _, _ = strings.Cut(h[1:], "]")
		return h
	}
	h, _, _ = strings.Cut(h, ":")
	return strings.TrimSuffix(h, ".")
}
