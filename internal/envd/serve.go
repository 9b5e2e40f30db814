package envd

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// serveHTTP answers requests on l until ctx ends or it fails. Where the sandbox
// is all there is around the agent, what its own programs ask is answered by a
// second server with tighter limits.
func (a *Agent) serveHTTP(ctx context.Context, l net.Listener) error {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Handler:           a.handler,
		Protocols:         protocols,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       640 * time.Second,
		// Every attached client holds a stream for as long as it stays.
		HTTP2:    &http.HTTP2Config{MaxConcurrentStreams: 1 << 16},
		ErrorLog: slog.NewLogLogger(a.log.Handler(), slog.LevelWarn),
	}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if !a.ownsMachine {
		return server.Serve(l)
	}
	return a.limitPrograms(ctx, func(handler http.Handler) error {
		server.Handler = handler
		return serveApart(server, l)
	})
}

// serveApart serves what comes through the host with server, and what comes from
// the sandbox's own programs with another one.
func serveApart(server *http.Server, l net.Listener) error {
	d := newDoor(l, maxInside, maxOutside)
	in := &http.Server{
		Handler:           fewInits(server.Handler),
		ReadHeaderTimeout: server.ReadHeaderTimeout,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          server.ErrorLog,
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, insideKey{}, true)
		},
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = in.Serve(&d.in)
	}()
	defer func() {
		in.Close()
		<-ended
	}()
	return server.Serve(d)
}

// insideKey marks requests of the sandbox's own programs.
type insideKey struct{}

// fewInits lets few at a time send what is read into memory before it is seen
// whether they may.
func fewInits(next http.Handler) http.Handler {
	const most = 2
	slots := make(chan struct{}, most)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/init" {
			next.ServeHTTP(w, r)
			return
		}
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
			next.ServeHTTP(w, r)
		default:
			http.Error(w, "too many at once", http.StatusServiceUnavailable)
		}
	})
}
