package process

import (
	"context"
	"net/http"
)

type flushKey struct{}

// BatchFlushes lets a stream's events leave when it has no more to send at the
// moment, rather than each on its own: the end of a short command and what it
// wrote are one packet then.
func BatchFlushes(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := context.WithValue(r.Context(), flushKey{}, http.NewResponseController(w))
		next.ServeHTTP(unflushed{w}, r.WithContext(ctx))
	})
}

// flush sends what a stream has gathered.
func flush(ctx context.Context) error {
	controller, ok := ctx.Value(flushKey{}).(*http.ResponseController)
	if !ok {
		return nil // every event has left already
	}
	return controller.Flush()
}

// unflushed ignores the flush after each event.
type unflushed struct{ http.ResponseWriter }

func (unflushed) Flush() {}

func (u unflushed) Unwrap() http.ResponseWriter { return u.ResponseWriter }
