package envd

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/wrenn/wrenn/internal/envd/forward"
)

// newForwarder returns the agent's forwarder, which rests while nothing runs.
// Only pid 1 can tell that: everything that runs descends from it.
func newForwarder(log *slog.Logger) *forward.Forwarder {
	c := forward.Config{Log: log}
	if IsInit() {
		c.Idle = forward.Childless
	}
	return forward.New(c)
}

// How long after it a request or a program's output points to new listeners. What
// a program prints is often just that it listens now.
const (
	requestAlert = 10 * time.Second
	outputAlert  = time.Second
)

// wakeForwarder wakes the forwarder for each request, which may start a program
// or make one listen, and for each piece of the answer.
func (a *Agent) wakeForwarder(next http.Handler) http.Handler {
	if a.forwarder == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.forwarder.Wake(requestAlert)
		next.ServeHTTP(wakingWriter{w, a.forwarder}, r)
	})
}

type wakingWriter struct {
	http.ResponseWriter
	forwarder *forward.Forwarder
}

func (w wakingWriter) Write(data []byte) (int, error) {
	w.forwarder.Wake(outputAlert)
	return w.ResponseWriter.Write(data)
}

func (w wakingWriter) Flush() {
	_ = http.NewResponseController(w.ResponseWriter).Flush() // as a Flusher, it cannot tell
}

func (w wakingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// runForwarder forwards until ctx ends, all ports but that of l.
func (a *Agent) runForwarder(ctx context.Context, l net.Listener) {
	if a.forwarder == nil {
		return
	}
	var own uint16
	if addr, ok := l.Addr().(*net.TCPAddr); ok {
		own = uint16(addr.Port)
	}
	a.forwarder.Run(ctx, own)
}
