package agent

import (
	"context"
	"errors"
	"regexp"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// buildIDPattern is the form of a template build's id, which names a directory.
var buildIDPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`)

// codes maps kinds of errors to the codes of the RPC interface.
var codes = map[error]connect.Code{
	sandbox.ErrInvalid:         connect.CodeInvalidArgument,
	sandbox.ErrUnauthenticated: connect.CodeUnauthenticated,
	sandbox.ErrForbidden:       connect.CodePermissionDenied,
	sandbox.ErrNotFound:        connect.CodeNotFound,
	sandbox.ErrConflict:        connect.CodeAlreadyExists,
	sandbox.ErrExhausted:       connect.CodeResourceExhausted,
	sandbox.ErrUnavailable:     connect.CodeUnavailable,
	sandbox.ErrUnimplemented:   connect.CodeUnimplemented,
}

// told is what the control plane gets to see of an error, and the error itself for
// the log.
type told struct {
	text string
	err  error
}

func (t told) Error() string { return t.text }

// logCauses logs what is behind errors whose text is all that is told.
func (a *Agent) logCauses(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		resp, err := next(ctx, req)
		var t told
		var e *sandbox.Error
		if errors.As(err, &t) && errors.As(t.err, &e) && e.Cause != nil {
			a.log.Warn("request failed", "procedure", req.Spec().Procedure, "err", t.err)
		}
		return resp, err
	}
}

// rpcError is err as the control plane sees it: the code of its kind and the
// text fit for users, the whole text where it has no kind. The control plane is
// part of the platform and decides what users get to see.
func rpcError(err error) error {
	kind := sandbox.Kind(err)
	switch {
	case kind != nil:
		text, _ := sandbox.Message(err)
		return connect.NewError(codes[kind], told{text, err})
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, err)
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, err)
	}
	return connect.NewError(connect.CodeInternal, err)
}
