package e2b

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// apiError is the body of every failure. Clients decide by its code, which is
// the HTTP status.
type apiError struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

// statusError is a failure that has a status but no kind of the domain.
type statusError struct {
	status  int
	message string
	allow   []string // methods, for 405
}

func (e *statusError) Error() string { return e.message }

var statuses = map[error]int{
	sandbox.ErrInvalid:         http.StatusBadRequest,
	sandbox.ErrUnauthenticated: http.StatusUnauthorized,
	sandbox.ErrForbidden:       http.StatusForbidden,
	sandbox.ErrNotFound:        http.StatusNotFound,
	sandbox.ErrConflict:        http.StatusConflict,
	sandbox.ErrExhausted:       http.StatusTooManyRequests,
	sandbox.ErrUnavailable:     http.StatusServiceUnavailable,
	sandbox.ErrUnimplemented:   http.StatusNotImplemented,
}

func invalid(format string, args ...any) error {
	return sandbox.Errorf(sandbox.ErrInvalid, format, args...)
}

// notServed is the failure of what E2B has and this platform does not, yet.
func notServed(what string) error {
	return sandbox.Errorf(sandbox.ErrUnimplemented, "%s is not served yet", what)
}

// writeError answers with err; what is internal goes to the log only.
func (a *api) writeError(w http.ResponseWriter, r *http.Request, err error) {
	if sandbox.Kind(err) == nil && errors.Is(err, context.Canceled) && r.Context().Err() != nil {
		return // nobody listens any more
	}
	var se *statusError
	if errors.As(err, &se) && len(se.allow) > 0 {
		w.Header().Set("Allow", strings.Join(se.allow, ", "))
	}
	body := a.failure(r, err)
	_ = writeJSON(w, body.Code, body)
}

// failure is what clients are told of err. What they are not told is logged.
func (a *api) failure(r *http.Request, err error) apiError {
	var se *statusError
	if errors.As(err, &se) {
		return apiError{se.status, se.message}
	}
	if text, ok := sandbox.Message(err); ok {
		status := statuses[sandbox.Kind(err)]
		if status >= 500 && status != http.StatusNotImplemented {
			a.log.Warn("request failed", "method", r.Method, "path", r.URL.Path, "status", status, "err", err)
		}
		return apiError{status, text}
	}
	a.log.Error("request failed", "method", r.Method, "path", r.URL.Path, "status", 500, "err", err)
	return apiError{http.StatusInternalServerError, "internal error; the server's log says more"}
}

func writeJSON(w http.ResponseWriter, status int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n')) // the client has gone; there is nobody to tell
	return nil
}

func noContent(w http.ResponseWriter) error {
	w.WriteHeader(http.StatusNoContent)
	return nil
}
