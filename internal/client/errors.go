package client

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// APIError is an answer of the platform other than success: of the control API,
// of the data plane's proxy, or of a sandbox's file routes. It matches the kinds
// of internal/sandbox, so errors.Is(err, sandbox.ErrNotFound) works.
type APIError struct {
	Op      string // what was asked for: "create sandbox"
	Status  int    // HTTP status
	Message string // the platform's words
}

func (e *APIError) Error() string {
	return fmt.Sprintf("%s: %s (%d)", e.Op, e.Message, e.Status)
}

// Is reports whether the status stands for the given kind.
func (e *APIError) Is(target error) bool {
	switch e.Status {
	case http.StatusBadRequest:
		return target == sandbox.ErrInvalid
	case http.StatusUnauthorized:
		return target == sandbox.ErrUnauthenticated
	case http.StatusForbidden:
		return target == sandbox.ErrForbidden
	case http.StatusNotFound:
		return target == sandbox.ErrNotFound
	case http.StatusConflict:
		return target == sandbox.ErrConflict
	case http.StatusTooManyRequests, http.StatusInsufficientStorage:
		return target == sandbox.ErrExhausted
	case http.StatusServiceUnavailable:
		return target == sandbox.ErrUnavailable
	case http.StatusNotImplemented:
		return target == sandbox.ErrUnimplemented
	}
	return false
}

// GoneError is the proxy's answer for a sandbox that does not run (unknown,
// killed, expired) or whose port nobody listens on.
type GoneError struct {
	SandboxID string
	Message   string
}

func (e *GoneError) Error() string {
	return fmt.Sprintf("sandbox %s: %s", e.SandboxID, e.Message)
}

// Is makes a GoneError match sandbox.ErrNotFound.
func (e *GoneError) Is(target error) bool { return target == sandbox.ErrNotFound }

// OutputError is a failure to write a process's output to where the caller wanted
// it. It tells a broken pipe of the caller's from a broken connection.
type OutputError struct{ Err error }

func (e *OutputError) Error() string { return "write output: " + e.Err.Error() }
func (e *OutputError) Unwrap() error { return e.Err }

// maxErrorBody is how much of an error answer is read.
const maxErrorBody = 64 << 10

// readError makes an APIError of an unsuccessful response. It does not close the
// body.
func readError(op string, resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	var shape struct {
		Message string `json:"message"`
	}
	message := strings.TrimSpace(string(body))
	if json.Unmarshal(body, &shape) == nil && shape.Message != "" {
		message = shape.Message
	}
	if len(message) > 1000 {
		message = message[:1000] + "…"
	}
	if message == "" {
		message = http.StatusText(resp.StatusCode)
	}
	return &APIError{Op: op, Status: resp.StatusCode, Message: message}
}
