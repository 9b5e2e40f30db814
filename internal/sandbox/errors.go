package sandbox

import (
	"errors"
	"fmt"
)

// The kinds of failure that callers tell apart. Every error that crosses a
// package boundary of the control plane or the host agent wraps one of them or
// is internal; each edge (HTTP, Connect) maps kinds to its own codes once.
var (
	ErrInvalid         = errors.New("invalid argument") // the caller's input is wrong; nothing was changed
	ErrUnauthenticated = errors.New("unauthenticated")  // no or bad credentials
	ErrForbidden       = errors.New("forbidden")        // known caller, not theirs
	ErrNotFound        = errors.New("not found")        // no such thing, or it has ended
	ErrConflict        = errors.New("conflict")         // not in the state that this needs
	ErrExhausted       = errors.New("exhausted")        // a quota or the host's capacity is used up
	ErrUnavailable     = errors.New("unavailable")      // try again later
	ErrUnimplemented   = errors.New("not served yet")   // known, but not built
)

// Error is a failure of a known kind with a message fit for the user: it says
// what is wrong and, where it can, what to do.
type Error struct {
	Kind    error // one of the Err* kinds above
	Message string
	Cause   error // may be nil; for logs, never shown to clients
}

func (e *Error) Error() string {
	if e.Cause != nil {
		return e.Message + ": " + e.Cause.Error()
	}
	return e.Message
}

func (e *Error) Unwrap() []error {
	if e.Cause == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.Cause}
}

// Errorf makes an Error of the given kind.
func Errorf(kind error, format string, args ...any) *Error {
	return &Error{Kind: kind, Message: fmt.Sprintf(format, args...)}
}

// Kind returns the kind of err, or nil when it has none (an internal error).
func Kind(err error) error {
	for _, k := range []error{
		ErrInvalid, ErrUnauthenticated, ErrForbidden, ErrNotFound,
		ErrConflict, ErrExhausted, ErrUnavailable, ErrUnimplemented,
	} {
		if errors.Is(err, k) {
			return k
		}
	}
	return nil
}

// Message returns the text of err that may be shown to a client, and false when
// err has no kind: then the client gets a general text and the log the rest.
func Message(err error) (string, bool) {
	var e *Error
	if errors.As(err, &e) {
		return e.Message, true
	}
	if k := Kind(err); k != nil {
		return k.Error(), true
	}
	return "", false
}
