package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"html/template"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// failure is an answer of the proxy's own.
type failure struct {
	SandboxID string `json:"sandboxId,omitempty"`
	Message   string `json:"message"`
	Port      uint16 `json:"port,omitempty"`
	Code      int    `json:"code"` // the HTTP status
}

func notFound(d Destination) failure {
	return failure{SandboxID: d.SandboxID, Message: "The sandbox was not found", Code: http.StatusBadGateway}
}

func portClosed(d Destination) failure {
	return failure{SandboxID: d.SandboxID, Message: "The sandbox is running but port is not open", Port: d.Port, Code: http.StatusBadGateway}
}

// failResolve answers a request whose sandbox could not be resolved.
func (p *Proxy) failResolve(s *stream, r *http.Request, err error) {
	f := failure{SandboxID: s.dest.SandboxID}
	message, _ := sandbox.Message(err)
	is := func(kinds ...error) bool {
		return slices.ContainsFunc(kinds, func(kind error) bool { return errors.Is(err, kind) })
	}
	switch {
	case s.isAborted(), is(sandbox.ErrNotFound, sandbox.ErrInvalid):
		f = notFound(s.dest)
	case s.clientCtx.Err() != nil:
		panic(http.ErrAbortHandler) // nobody is there to read an answer
	case is(sandbox.ErrConflict, sandbox.ErrUnavailable, sandbox.ErrExhausted):
		f.Message, f.Code = message, http.StatusServiceUnavailable
	case is(sandbox.ErrForbidden, sandbox.ErrUnauthenticated):
		f.Message, f.Code = message, http.StatusForbidden
	default:
		p.log.Error("resolve sandbox", "sandbox", s.dest.SandboxID, "error", err)
		f.Message, f.Code = "The sandbox could not be looked up", http.StatusInternalServerError
	}
	s.fail(r, f)
}

func notAnswered(d Destination) failure {
	return failure{SandboxID: d.SandboxID, Message: "The application in the sandbox did not answer properly", Port: d.Port, Code: http.StatusBadGateway}
}

// failForward answers a request that the guest did not.
func (p *Proxy) failForward(s *stream, out *http.Request, err error) {
	var dial *dialError
	var refused *refusal
	switch {
	case s.isAborted(), errors.Is(err, errEvicted):
		s.fail(out, notFound(s.dest))
	case s.clientCtx.Err() != nil:
		panic(http.ErrAbortHandler)
	case errors.As(err, &dial):
		s.dialFailed()
		p.log.Debug("dial guest", "sandbox", s.dest.SandboxID, "port", s.dest.Port, "error", err)
		if s.hopPrefix != "" {
			s.fail(out, failure{SandboxID: s.dest.SandboxID, Message: "The host of the sandbox cannot be reached just now; try again in a moment", Code: http.StatusServiceUnavailable})
			return
		}
		s.fail(out, p.unreachable(s))
	case errors.As(err, &refused):
		s.fail(out, refused.failure)
	case s.upload != nil && s.upload.broken.Load():
		s.fail(out, failure{SandboxID: s.dest.SandboxID, Message: "The request body is malformed", Code: http.StatusBadRequest})
	default:
		p.log.Debug("forward request", "sandbox", s.dest.SandboxID, "port", s.dest.Port, "error", err)
		s.fail(out, notAnswered(s.dest))
	}
}

// unreachable tells a closed port from a sandbox that has just gone.
func (p *Proxy) unreachable(s *stream) failure {
	_, err := p.resolver.Resolve(s.ctx, s.dest.SandboxID)
	if errors.Is(err, sandbox.ErrNotFound) || errors.Is(err, context.Canceled) {
		return notFound(s.dest)
	}
	return portClosed(s.dest)
}

// fail writes the proxy's own answer.
func (s *stream) fail(r *http.Request, f failure) {
	s.mu.Lock()
	s.failing = true
	s.mu.Unlock()
	writeFailure(s, r, f)
}

// writeFailure writes f as a page for people and as JSON for programs. Scripts of
// any origin may read it, as they may read the guest agent's own answers.
func writeFailure(w http.ResponseWriter, r *http.Request, f failure) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("X-Content-Type-Options", "nosniff")
	if wantsPage(r) {
		h.Set("Content-Type", "text/html; charset=utf-8")
		w.WriteHeader(f.Code)
		_ = failurePage.Execute(w, f) // fails only when the client has gone
		return
	}
	h.Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(f.Code)
	_ = json.NewEncoder(w).Encode(f) // likewise
}

var browser = regexp.MustCompile(`(?i)mozilla|chrome|safari|firefox|edge|opera|msie`)

// wantsPage reports whether a person's browser is loading a page. Scripts in a
// browser send its User-Agent too, but say otherwise that they are scripts.
func wantsPage(r *http.Request) bool {
	accept := strings.ToLower(r.Header.Get("Accept"))
	if strings.Contains(accept, "application/json") && !strings.Contains(accept, "text/html") {
		return false
	}
	switch strings.ToLower(r.Header.Get("Sec-Fetch-Mode")) {
	case "navigate":
	case "":
		if r.Header.Get("X-Requested-With") != "" {
			return false
		}
	default:
		return false
	}
	return browser.MatchString(r.UserAgent())
}

var failurePage = template.Must(template.New("failure").Parse(`<html lang="en">
<head><meta charset="utf-8"><title>{{.Message}}</title>
<style>body{font-family:system-ui,sans-serif;max-width:36rem;margin:15vh auto;padding:0 1rem;color:#222;background:#fff}
code{background:#eee;padding:.1em .3em}@media(prefers-color-scheme:dark){body{color:#ddd;background:#111}code{background:#333}}</style></head>
<body><h1>{{.Message}}</h1>
{{if .SandboxID}}<p>Sandbox <code>{{.SandboxID}}</code>{{if .Port}}, port <code>{{.Port}}</code>{{end}}</p>{{end}}
{{if and .Port (eq .Code 502)}}<p>Start a server on port {{.Port}} inside the sandbox, then load this page again.</p>{{end}}
<p>Status {{.Code}}</p></body></html>
`))
