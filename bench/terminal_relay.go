package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync/atomic"
	"time"
)

// protocolWindow is the flow-control window of HTTP/2 at the start (RFC 9113,
// section 6.9.2), in bytes. Some clients and servers leave it at that.
const protocolWindow = 64<<10 - 1

// relayReport is what a relay says at its end.
type relayReport struct {
	Connections int32 `json:"connections"` // made to the platform
}

// ServeTerminalRelay is what the data plane must not be: a reverse proxy that
// carries everything, terminals and applications alike, over one HTTP/2
// connection to the platform at target. window is how many bytes may be on their
// way on the connection, and on each of its streams; 0 leaves both to the
// standard library. It prints its address to out, and ends when in does, with a
// relayReport.
func ServeTerminalRelay(in io.Reader, out io.Writer, target string, window int) error {
	to, err := url.Parse(target)
	if err != nil {
		return err
	}
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	var dials atomic.Int32
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	proxy := &httputil.ReverseProxy{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				dials.Add(1)
				return new(net.Dialer).DialContext(ctx, network, address)
			},
			Protocols:          protocols,
			MaxConnsPerHost:    1, // several are made otherwise when requests come at once
			HTTP2:              &http.HTTP2Config{MaxReceiveBufferPerConnection: window, MaxReceiveBufferPerStream: window},
			DisableCompression: true,
		},
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to)
			r.Out.Host = to.Host
		},
		FlushInterval: -1,
		ErrorLog:      log.New(io.Discard, "", 0), // clients that leave
	}
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			// Fails only where it is of no use.
			_ = http.NewResponseController(w).EnableFullDuplex()
			proxy.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          log.New(io.Discard, "", 0),
	}
	if _, err := fmt.Fprintf(out, "http://%s\n", l.Addr()); err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, in)
		server.Close()
	}()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return json.NewEncoder(out).Encode(relayReport{Connections: dials.Load()})
}
