package e2b

import (
	"net/http"
	"net/url"
	"strings"
)

// route is one operation of the API.
type route struct {
	method  string
	pattern string // segments; "{name}" takes any one segment, encoded slashes included
	handle  func(*call) error
	open    bool // needs no API key
	missing bool // known, answered with 501
}

// table is every operation that E2B's clients know.
func (a *api) table() []route {
	routes := []route{
		{method: "GET", pattern: "/health", handle: a.health, open: true},
		{method: "GET", pattern: "/metrics", handle: a.platformMetrics},

		{method: "POST", pattern: "/sandboxes", handle: a.createV1},
		{method: "POST", pattern: "/v2/sandboxes", handle: a.createV2},
		{method: "GET", pattern: "/sandboxes", handle: a.listV1},
		{method: "GET", pattern: "/v2/sandboxes", handle: a.listV2},
		{method: "GET", pattern: "/sandboxes/metrics", handle: a.metricsOfMany},
		{method: "GET", pattern: "/sandboxes/{sandboxID}", handle: a.get},
		{method: "DELETE", pattern: "/sandboxes/{sandboxID}", handle: a.kill},
		{method: "POST", pattern: "/sandboxes/{sandboxID}/timeout", handle: a.setTimeout},
		{method: "POST", pattern: "/sandboxes/{sandboxID}/refreshes", handle: a.refresh},
		{method: "POST", pattern: "/sandboxes/{sandboxID}/connect", handle: a.connectV1},
		{method: "POST", pattern: "/v2/sandboxes/{sandboxID}/connect", handle: a.connectV2},
		{method: "POST", pattern: "/sandboxes/{sandboxID}/pause", handle: a.pause},
		{method: "POST", pattern: "/sandboxes/{sandboxID}/resume", handle: a.resume},
		{method: "POST", pattern: "/sandboxes/{sandboxID}/fork", handle: a.fork},
		{method: "POST", pattern: "/sandboxes/{sandboxID}/snapshots", handle: a.snapshot},
		{method: "GET", pattern: "/snapshots", handle: a.listSnapshots},
		{method: "GET", pattern: "/sandboxes/{sandboxID}/metrics", handle: a.metrics},
		{method: "GET", pattern: "/sandboxes/{sandboxID}/logs", handle: a.logsV1},
		{method: "GET", pattern: "/v2/sandboxes/{sandboxID}/logs", handle: a.logsV2},

		// Not of E2B: this platform's own.
		{method: "POST", pattern: "/sandboxes/{sandboxID}/preview-links", handle: a.previewLink},
		{method: "GET", pattern: "/sandboxes/{sandboxID}/events", handle: a.events},
		{method: "GET", pattern: "/events", handle: a.teamEvents},

		{method: "GET", pattern: "/templates", handle: a.listTemplates},
		{method: "GET", pattern: "/v2/templates", handle: a.listTemplates},
		{method: "GET", pattern: "/templates/{templateID}", handle: a.getTemplate},
		{method: "DELETE", pattern: "/templates/{templateID}", handle: a.deleteTemplate},
		{method: "GET", pattern: "/templates/aliases/{alias}", handle: a.getAlias},
	}
	for _, m := range missing {
		for _, operation := range m.operations {
			method, pattern, _ := strings.Cut(operation, " ")
			routes = append(routes, route{
				method: method, pattern: pattern, missing: true,
				handle: func(*call) error { return notServed(m.what) },
			})
		}
	}
	return routes
}

// missing is what E2B serves and this platform does not, yet.
var missing = []struct {
	what       string
	operations []string
}{
	{"changing a sandbox's network", []string{"PUT /sandboxes/{sandboxID}/network"}},
	{"E2B's shape of events, beside GET /sandboxes/{sandboxID}/events,", []string{"GET /events/sandboxes", "GET /events/sandboxes/{sandboxID}"}},
	{"building templates", []string{
		"POST /v3/templates", "POST /v2/templates", "POST /templates", "POST /templates/{templateID}",
		"GET /templates/{templateID}/files/{hash}",
		"POST /templates/{templateID}/builds/{buildID}", "POST /v2/templates/{templateID}/builds/{buildID}",
		"GET /templates/{templateID}/builds/{buildID}/status", "GET /templates/{templateID}/builds/{buildID}/logs",
	}},
	{"changing templates", []string{
		"PATCH /templates/{templateID}", "PATCH /v2/templates/{templateID}",
	}},
	{"the list of default templates", []string{"GET /default-templates"}},
	{"tagging templates", []string{
		"POST /templates/tags", "DELETE /templates/tags", "GET /templates/{templateID}/tags",
		"GET /templates/{templateID}/tags/count", "GET /templates/{templateID}/tags/exists",
		"GET /templates/{templateID}/tags/groups", "GET /templates/{templateID}/tags/{tag}/assignments",
	}},
	{"teams", []string{"GET /teams", "GET /teams/{teamID}/metrics", "GET /teams/{teamID}/metrics/max"}},
	{"managing API keys over the API", []string{
		"GET /api-keys", "POST /api-keys", "PATCH /api-keys/{apiKeyID}", "DELETE /api-keys/{apiKeyID}",
	}},
	{"access tokens", []string{"POST /access-tokens", "DELETE /access-tokens/{accessTokenID}"}},
	{"nodes", []string{"GET /nodes", "GET /nodes/{nodeID}", "POST /nodes/{nodeID}"}},
	{"volumes", []string{"GET /volumes", "POST /volumes", "GET /volumes/{volumeID}", "DELETE /volumes/{volumeID}"}},
	{"secrets", []string{
		"GET /secrets", "POST /secrets", "GET /secrets/{secretID}", "POST /secrets/{secretID}", "DELETE /secrets/{secretID}",
	}},
}

func (a *api) health(c *call) error { return noContent(c.w) }

// match finds the route of a request. Of several that fit, the one whose
// segments are literal further to the left wins.
func (a *api) match(method, escapedPath string) (*route, map[string]string, error) {
	segments := strings.Split(strings.TrimPrefix(escapedPath, "/"), "/")
	for i, s := range segments {
		plain, err := url.PathUnescape(s)
		if err != nil {
			return nil, nil, invalid("malformed path")
		}
		segments[i] = plain
	}
	var best, bestOfMethod *route
	var allow []string
	for i := range a.routes {
		rt := &a.routes[i]
		if !fits(rt.pattern, segments) {
			continue
		}
		if best == nil || moreLiteral(rt.pattern, best.pattern) {
			best, bestOfMethod, allow = rt, nil, nil
		}
		if rt.pattern == best.pattern {
			allow = append(allow, rt.method)
			if rt.method == method || (method == http.MethodHead && rt.method == http.MethodGet) {
				bestOfMethod = rt
			}
		}
	}
	switch {
	case best == nil:
		return nil, nil, &statusError{status: http.StatusNotFound, message: "no such route"}
	case bestOfMethod == nil:
		return nil, nil, &statusError{status: http.StatusMethodNotAllowed, message: "method not allowed here", allow: allow}
	}
	params := make(map[string]string)
	for i, p := range strings.Split(bestOfMethod.pattern[1:], "/") {
		if strings.HasPrefix(p, "{") {
			params[strings.Trim(p, "{}")] = segments[i]
		}
	}
	return bestOfMethod, params, nil
}

func fits(pattern string, segments []string) bool {
	parts := strings.Split(pattern[1:], "/")
	if len(parts) != len(segments) {
		return false
	}
	for i, p := range parts {
		if strings.HasPrefix(p, "{") {
			if segments[i] == "" {
				return false
			}
		} else if p != segments[i] {
			return false
		}
	}
	return true
}

func moreLiteral(a, b string) bool {
	as, bs := strings.Split(a, "/"), strings.Split(b, "/")
	for i := range as {
		la, lb := !strings.HasPrefix(as[i], "{"), !strings.HasPrefix(bs[i], "{")
		if la != lb {
			return la
		}
	}
	return false
}
