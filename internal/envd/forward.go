package envd

import (
	"context"
	"log/slog"
	"net"
	"net/http"

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

// wakeForwarder wakes the forwarder for each request: it may start a program, or
// make one listen.
func (a *Agent) wakeForwarder(next http.Handler) http.Handler {
	if a.forwarder == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.forwarder.Wake()
		next.ServeHTTP(w, r)
	})
}

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
