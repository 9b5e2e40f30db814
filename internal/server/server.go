// Package server is the HTTP front of the platform: it listens, terminates TLS,
// decides whether a request is for the API or for a sandbox, and hands it on.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/server/http1"
	_ "github.com/wrenn/wrenn/internal/server/xconnect" // WebSockets over HTTP/2
)

const (
	readHeaderTimeout = 10 * time.Second
	// Longer than the 600 s for which load balancers keep idle connections, so
	// that they never send a request on one that is just being closed here.
	idleTimeout    = 620 * time.Second
	maxHeaderBytes = 256 << 10
	defaultGrace   = 500 * time.Millisecond

	// HTTP/2. A stream whose receiver does not read keeps its window's worth of
	// the connection's window. The connection's is 128 times a stream's, so that
	// a few stalled uploads do not stop the terminals on the same connection.
	maxStreams       = 4096
	streamWindow     = 256 << 10
	connectionWindow = 32 << 20
	pingAfter        = 60 * time.Second // of silence; finds clients that vanished
)

// Config is what a Server needs.
type Config struct {
	API   http.Handler // serves what is for no sandbox
	Proxy *proxy.Proxy // the domain of the platform is the proxy's
	Log   *slog.Logger
	// Grace is how long requests under way may take to finish after Serve has
	// been told to stop; streams that last longer are broken off. Zero means 500 ms.
	Grace time.Duration
}

// Server is the front. It does not write deadlines on answers: streams last as
// long as they last.
type Server struct {
	api   http.Handler
	proxy *proxy.Proxy
	log   *slog.Logger
	grace time.Duration
	http  *http.Server
	plain *http1.Server // accepts, and serves what needs no net/http
}

// New returns a server; Serve runs it.
func New(cfg Config) *Server {
	s := &Server{api: cfg.API, proxy: cfg.Proxy, log: cfg.Log, grace: cfg.Grace}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.grace == 0 {
		s.grace = defaultGrace
	}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	s.http = &http.Server{
		Handler:           s,
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		Protocols:         &protocols,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          maxStreams,
			MaxReceiveBufferPerStream:     streamWindow,
			MaxReceiveBufferPerConnection: connectionWindow,
			SendPingTimeout:               pingAfter,
		},
		// "OPTIONS *" gets an answer from the API or a sandbox like all else.
		DisableGeneralOptionsHandler: true,
		// Failed handshakes and the like: the clients' doing.
		ErrorLog:    slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
	s.plain = http1.New(http1.Config{
		Take: s.take, HeaderTimeout: readHeaderTimeout, IdleTimeout: idleTimeout, Log: s.log,
	})
	return s
}

// connKey is where the context of a request of net/http has its connection.
type connKey struct{}

// take picks the requests that need no net/http: those to sandboxes.
func (s *Server) take(r *http.Request) http.Handler {
	d, ok, err := s.proxy.Route(r)
	if err != nil || !ok {
		return nil
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.proxy.Forward(w, r, d) })
}

// ServeHTTP hands a request to the sandbox that it names, else to the API. The
// path is not touched, let alone cleaned.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if c, ok := r.Context().Value(connKey{}).(net.Conn); ok {
		if r.TLS == nil {
			r.TLS = http1.TLS(c)
		}
		if halfClosable(r) {
			var answered func()
			r, answered = lastRequest(r, c)
			defer answered()
		}
	}
	d, ok, err := s.proxy.Route(r)
	switch {
	case err != nil:
		proxy.RouteError(w, err)
	case ok:
		s.proxy.Forward(w, r, d)
	default:
		s.api.ServeHTTP(w, r)
	}
}

// Listeners are what a Server serves on.
type Listeners struct {
	Plain     []net.Listener // HTTP/1.1 and HTTP/2 with prior knowledge
	TLS       []net.Listener // HTTP/1.1 and HTTP/2 by ALPN; bare TCP listeners
	TLSConfig *tls.Config    // needed with TLS; see Certificate
}

// Serve serves until ctx is done, then stops gracefully: no new connections,
// requests under way get the time of grace, what is left is broken off. It
// returns nil after such a stop. It closes the listeners and the proxy, and can
// be called once.
func (s *Server) Serve(ctx context.Context, l Listeners) error {
	if len(l.TLS) > 0 && l.TLSConfig == nil {
		return errors.New("serve: TLS listeners without a TLS configuration")
	}
	serving, ctx := errgroup.WithContext(ctx)
	for _, ln := range l.Plain {
		serving.Go(func() error { return served(ln, s.plain.Serve(ln, nil)) })
	}
	if len(l.TLS) > 0 {
		config := l.TLSConfig.Clone()
		for _, protocol := range []string{"http/1.1", "h2"} {
			if !slices.Contains(config.NextProtos, protocol) {
				config.NextProtos = append([]string{protocol}, config.NextProtos...)
			}
		}
		for _, ln := range l.TLS {
			serving.Go(func() error { return served(ln, s.plain.Serve(ln, config)) })
		}
	}
	serving.Go(func() error { return served(s.plain, s.http.Serve(s.plain)) })
	serving.Go(func() error {
		<-ctx.Done()
		s.stop()
		return nil
	})
	return serving.Wait()
}

// served drops the error that says that serving ended as asked.
func served(ln net.Listener, err error) error {
	if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return fmt.Errorf("serve on %s: %w", ln.Addr(), err)
}

func (s *Server) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), s.grace)
	defer cancel()
	// Requests that wait for a sandbox would not end by themselves.
	context.AfterFunc(ctx, s.proxy.Close)
	var ending sync.WaitGroup
	ending.Go(func() {
		if err := s.plain.Shutdown(ctx); err != nil {
			s.log.Info("breaking off the requests that are still under way", "after", s.grace)
		}
	})
	if err := s.http.Shutdown(ctx); err != nil {
		s.log.Info("breaking off the requests that are still under way", "after", s.grace)
	}
	ending.Wait()
	s.Close()
}

// Close stops at once: every connection is closed, every stream broken off.
func (s *Server) Close() {
	s.proxy.Close()
	now, cancel := context.WithCancel(context.Background())
	cancel()
	// The error says that something was broken off.
	_ = s.plain.Shutdown(now)
	// The error is that of a listener which is closed already.
	_ = s.http.Close()
}
