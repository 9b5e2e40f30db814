package server_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/http2"

	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/server"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("net/http.(*conn).closeWriteAndWait"))
} // it sleeps for half a second after some refusals

const id = "aaaaaaaaaaaaaaaaaaaa"

// loopback resolves the one sandbox there is.
type loopback struct{}

func (loopback) Resolve(_ context.Context, asked string) (proxy.Target, error) {
	if asked != id {
		return proxy.Target{}, sandbox.Errorf(sandbox.ErrNotFound, "sandbox %s not found", asked)
	}
	return proxy.Target{SandboxID: id, Addr: netip.MustParseAddr("127.0.0.1")}, nil
}

// platform is a running server whose API answers "api PATH".
type platform struct {
	*server.Server
	plain, tls string // addresses
	stop       context.CancelFunc
	stopped    chan error
}

func start(t *testing.T, cfg server.Config, tlsConfig *tls.Config) *platform {
	t.Helper()
	if cfg.API == nil {
		cfg.API = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "api ", r.RequestURI, " ", r.Proto)
		})
	}
	cfg.Proxy = proxy.New(proxy.Config{Resolver: loopback{}, Domain: "wrenn.test"})
	p := &platform{Server: server.New(cfg), stopped: make(chan error, 1)}
	var l server.Listeners
	var err error
	if l.Plain, err = server.Listen("localhost:0"); err != nil {
		t.Fatal(err)
	}
	p.plain = l.Plain[0].Addr().String()
	if tlsConfig != nil {
		if l.TLS, err = server.Listen("localhost:0"); err != nil {
			t.Fatal(err)
		}
		l.TLSConfig, p.tls = tlsConfig, l.TLS[0].Addr().String()
	}
	var ctx context.Context
	ctx, p.stop = context.WithCancel(context.Background())
	go func() { p.stopped <- p.Serve(ctx, l) }()
	t.Cleanup(func() {
		p.stop()
		p.Close()
	})
	return p
}

// guest starts a server in the sandbox and returns its host under the domain.
func guest(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(func() {
		srv.CloseClientConnections()
		srv.Close()
	})
	return fmt.Sprintf("%d-%s.wrenn.test", srv.Listener.Addr().(*net.TCPAddr).Port, id)
}

// client speaks HTTP/1.1 or HTTP/2 (on plain with prior knowledge) and connects to
// addr whatever the URL says.
func client(t *testing.T, addr string, http2 bool, roots *x509.CertPool) *http.Client {
	var protocols http.Protocols
	protocols.SetHTTP1(!http2)
	protocols.SetHTTP2(http2)
	protocols.SetUnencryptedHTTP2(http2)
	tr := &http.Transport{
		Protocols:       &protocols,
		TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, addr)
		},
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

func get(t *testing.T, c *http.Client, url string, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body)
}

func receive[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(10 * time.Second):
		t.Fatal("nothing came within 10 s")
		panic("unreachable")
	}
}

func TestRequestsGoWhereTheyBelong(t *testing.T) {
	certFile, keyFile, roots := writeCertificate(t, t.TempDir(), "first")
	cert, err := server.LoadCertificate(certFile, keyFile, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	p := start(t, server.Config{}, cert.TLSConfig())
	app := guest(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "app ", r.RequestURI, " ", r.Header.Get("X-Forwarded-Proto"))
	})
	port, _, _ := strings.Cut(app, "-")
	for _, version := range []struct {
		name   string
		scheme string
		c      *http.Client
		proto  string
	}{
		{"plain HTTP/1.1", "http", client(t, p.plain, false, nil), "HTTP/1.1"},
		{"plain HTTP/2", "http", client(t, p.plain, true, nil), "HTTP/2.0"},
		{"TLS HTTP/1.1", "https", client(t, p.tls, false, roots), "HTTP/1.1"},
		{"TLS HTTP/2", "https", client(t, p.tls, true, roots), "HTTP/2.0"},
	} {
		t.Run(version.name, func(t *testing.T) {
			for _, tt := range []struct {
				name, host, path string
				header           []string
				status           int
				want             string // beginning of the body
			}{
				{"sandbox by host", app, "/a//b?", nil, 200, "app /a//b? " + version.scheme},
				{"API by host", "api.wrenn.test", "/sandboxes/x%2Fy", nil, 200, "api /sandboxes/x%2Fy " + version.proto},
				{"API path is not cleaned", "api.wrenn.test", "//a/../b", nil, 200, "api //a/../b"},
				{"domain", "wrenn.test", "/", nil, 200, "api /"},
				{"IP address", "127.0.0.1", "/", nil, 200, "api /"},
				{"IP address with headers", "127.0.0.1", "/x", []string{"E2b-Sandbox-Id", id, "E2b-Sandbox-Port", port}, 200, "app /x"},
				{"shared host", "sandbox.wrenn.test", "/x", []string{"E2b-Sandbox-Id", id, "E2b-Sandbox-Port", port}, 200, "app /x"},
				{"shared host without headers", "sandbox.wrenn.test", "/", nil, 400, "Invalid routing headers"},
				{"unknown host under the domain", "www.wrenn.test", "/", nil, 400, "Invalid host"},
				{"unknown sandbox", "80-bbbbbbbbbbbbbbbbbbbb.wrenn.test", "/health", nil, 502, `{"sandboxId":"bbbbbbbbbbbbbbbbbbbb","message":"The sandbox was not found","code":502}`},
			} {
				res, body := get(t, version.c, version.scheme+"://"+tt.host+tt.path, tt.header...)
				if res.StatusCode != tt.status || !strings.HasPrefix(body, tt.want) {
					t.Errorf("%s: %s %q, want %d %q", tt.name, res.Status, body, tt.status, tt.want)
				}
				if res.Proto != version.proto {
					t.Errorf("%s: spoke %s", tt.name, res.Proto)
				}
			}
		})
	}
}

func TestServeStopsGracefully(t *testing.T) {
	for name, tt := range map[string]struct {
		grace    time.Duration
		finishes bool
	}{
		"a short request finishes":  {time.Minute, true},
		"a stream gets broken off":  {50 * time.Millisecond, false},
		"nothing waits for streams": {-1, false},
	} {
		t.Run(name, func(t *testing.T) {
			p := start(t, server.Config{Grace: tt.grace}, nil)
			finish := make(chan struct{})
			host := guest(t, func(w http.ResponseWriter, r *http.Request) {
				w.(http.Flusher).Flush()
				select {
				case <-finish:
				case <-r.Context().Done():
				}
			})
			res, err := client(t, p.plain, false, nil).Get("http://" + host)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			p.stop()
			if tt.finishes {
				waitRefused(t, p.plain)
				close(finish)
			}
			_, err = io.ReadAll(res.Body)
			if (err == nil) != tt.finishes {
				t.Errorf("end of the stream: %v", err)
			}
			if err := receive(t, p.stopped); err != nil {
				t.Errorf("Serve = %v", err)
			}
		})
	}
}

// waitRefused waits until nobody listens on addr.
func waitRefused(t *testing.T, addr string) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return
		}
		c.Close()
	}
	t.Fatal("still listening after 10 s")
}

func TestCloseBreaksStreamsOffAtOnce(t *testing.T) {
	p := start(t, server.Config{Grace: time.Hour}, nil)
	host := guest(t, func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	res, err := client(t, p.plain, false, nil).Get("http://" + host)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	p.Close()
	if _, err = io.ReadAll(res.Body); err == nil {
		t.Error("the stream ended cleanly")
	}
}

func TestHTTP2LeavesRoomForManyStreams(t *testing.T) {
	p := start(t, server.Config{}, nil)
	conn, err := net.Dial("tcp", p.plain)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	io.WriteString(conn, http2.ClientPreface)
	framer := http2.NewFramer(conn, conn)
	framer.WriteSettings()
	var streams, streamWindow, connWindow uint32 = 0, 65535, 65535
	for seen := 0; seen < 2; {
		frame, err := framer.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if f.IsAck() {
				continue
			}
			streams, _ = f.Value(http2.SettingMaxConcurrentStreams)
			streamWindow, _ = f.Value(http2.SettingInitialWindowSize)
			seen++
		case *http2.WindowUpdateFrame:
			connWindow += f.Increment
			seen++
		}
	}
	if streams < 1000 {
		t.Errorf("%d streams", streams)
	}
	if streamWindow < 256<<10 || connWindow < 64*streamWindow {
		t.Errorf("windows of %d bytes a stream and %d a connection: 64 stalled uploads would stop the rest", streamWindow, connWindow)
	}
}

func TestHeadersThatGrowWithoutEndAreRefused(t *testing.T) {
	p := start(t, server.Config{}, nil)
	for name, host := range map[string]string{"API": "api.wrenn.test", "sandbox": "80-" + id + ".wrenn.test"} {
		t.Run("HTTP/1.1, "+name, func(t *testing.T) {
			conn, err := net.Dial("tcp", p.plain)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			go func() {
				line := "X-Bomb: " + strings.Repeat("x", 1000) + "\r\n"
				for _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: "+host+"\r\n"); err == nil; {
					_, err = io.WriteString(conn, line) // until the server has enough
				}
			}()
			answer := make([]byte, 1<<10)
			n, err := conn.Read(answer)
			if !strings.HasPrefix(string(answer[:n]), "HTTP/1.1 431 ") {
				t.Errorf("answer = %q, %v", answer[:n], err)
			}
			io.Copy(io.Discard, conn) // until the server has ended it, which takes it a moment
		})
	}
	t.Run("HTTP/2", func(t *testing.T) {
		req, err := http.NewRequest("GET", "http://api.wrenn.test/", nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 400 {
			req.Header.Set(fmt.Sprint("X-Bomb-", i), strings.Repeat("x", 1000))
		}
		res, err := client(t, p.plain, true, nil).Do(req)
		if err == nil {
			defer res.Body.Close()
		}
		if err == nil && res.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("answer = %s", res.Status)
		}
	})
}
