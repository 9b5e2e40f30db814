package process

import (
	"context"
	"net/http"
	"time"
)

// lastWords is how long after a stream's deadline its client can still take what
// is under way, and the error that ends it.
const lastWords = 2 * time.Second

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

// limitWrites breaks a stream that has a deadline off soon after it. Else a client
// that reads nothing would keep it in a write, and hold the process up, for good.
func limitWrites(ctx context.Context) {
	deadline, ok := ctx.Deadline()
	controller, _ := ctx.Value(flushKey{}).(*http.ResponseController)
	if ok && controller != nil {
		_ = controller.SetWriteDeadline(deadline.Add(lastWords))
	}
}

// unflushed ignores the flush after each event.
type unflushed struct{ http.ResponseWriter }

func (unflushed) Flush() {}

func (u unflushed) Unwrap() http.ResponseWriter { return u.ResponseWriter }
