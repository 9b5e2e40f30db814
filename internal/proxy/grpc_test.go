package proxy_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
)

// grpcGuest speaks HTTP/2 only, as gRPC servers do.
func grpcGuest(t testing.TB, h http.HandlerFunc) uint16 {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var h2c http.Protocols
	h2c.SetUnencryptedHTTP2(true)
	srv := &http.Server{Handler: h, Protocols: &h2c} //nolint:gosec // a test's
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(ln) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return uint16(ln.Addr().(*net.TCPAddr).Port)
}

func TestCallsOfGRPCPass(t *testing.T) {
	for _, hops := range []int{1, 2} {
		t.Run(fmt.Sprint(hops, " hops"), func(t *testing.T) {
			w := newWorld(t)
			if hops == 2 {
				w.behindAgent(t)
			}
			port := grpcGuest(t, func(rw http.ResponseWriter, r *http.Request) {
				if r.ProtoMajor != 2 || r.Header.Get("Te") != "trailers" || r.RequestURI != "/echo.Echo/Say" {
					t.Errorf("guest got %s %s te=%q", r.Proto, r.RequestURI, r.Header.Get("Te"))
				}
				rw.Header().Set("Content-Type", "application/grpc")
				echo(rw, r)
				rw.Header().Set(http.TrailerPrefix+"Grpc-Status", "7")
			})
			body, upload := io.Pipe()
			req := w.request(t, "POST", idA, port, "/echo.Echo/Say", body)
			req.Header.Set("Content-Type", "application/grpc+proto")
			req.Header.Set("Te", "trailers")
			res, err := w.http2.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			for i := range 3 { // both sides talk in turn
				piece := fmt.Sprint("piece ", i)
				io.WriteString(upload, piece)
				got := make([]byte, len(piece))
				if _, err := io.ReadFull(res.Body, got); err != nil || string(got) != piece {
					t.Fatalf("%q came back as %q, %v", piece, got, err)
				}
			}
			upload.Close()
			if rest, err := io.ReadAll(res.Body); err != nil || len(rest) > 0 {
				t.Errorf("end = %q, %v", rest, err)
			}
			if got := res.Trailer.Get("Grpc-Status"); got != "7" {
				t.Errorf("trailer = %v", res.Trailer)
			}
			w.kill(idA)
			w.waitIdle(t)
		})
	}
}

func TestOnlyCallsOfGRPCAreHTTP2(t *testing.T) {
	w := newWorld(t)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, r.Proto) })
	for kind, client := range map[string]*http.Client{"application/grpc-web": w.http2, "application/grpc": w.http1, "text/plain": w.http2} {
		req := w.request(t, "POST", idA, port, "/", nil)
		req.Header.Set("Content-Type", kind)
		if _, proto := do(t, client, req); proto != "HTTP/1.1" {
			t.Errorf("%s reached the guest in %s", kind, proto)
		}
	}
}
