package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

var grpcEcho = application{"grpc", "python3 -m venv venv && venv/bin/pip install -q -r requirements.txt"}

// A client and a server of two implementations, on both sides of the proxy.
func TestGRPC(t *testing.T) {
	w := startWeb(t, grpcEcho.rootfs(t))
	b := w.create(nil)
	const port = 50051
	server := b.background(asUser("grpc", fmt.Sprintf("venv/bin/python echo.py %d 127.0.0.1", port)), false)
	server.says("listening")
	forms := w.forms(b, port)
	for _, f := range forms[:2] { // a gRPC client cannot put anything before its paths
		t.Run(f.name, func(t *testing.T) {
			callGRPC(t, dialGRPC(t, w, f), server)
		})
	}
	t.Run("routing headers", func(t *testing.T) {
		client := dialGRPC(t, w, form{url: w.url})
		ctx := metadata.AppendToOutgoingContext(t.Context(), "e2b-sandbox-id", b.id, "e2b-sandbox-port", fmt.Sprint(port))
		if got, err := client.call(ctx, "Unary", []byte("hello")); err != nil || string(got) != "hello" {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("a port without a server is unavailable", func(t *testing.T) {
		for _, f := range w.forms(b, port+1)[:2] {
			if _, err := dialGRPC(t, w, f).call(t.Context(), "Unary", nil); status.Code(err) != codes.Unavailable {
				t.Errorf("%s: %v", f.name, err)
			}
		}
	})
	t.Run("calls end with the sandbox", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		talk, err := dialGRPC(t, w, forms[0]).stream(ctx, "Wait", []byte("for ever"))
		if err != nil {
			t.Fatal(err)
		}
		var first []byte
		if err := talk.RecvMsg(&first); err != nil {
			t.Fatal(err)
		}
		b.kill()
		if err := talk.RecvMsg(&first); status.Code(err) != codes.Unavailable && status.Code(err) != codes.Internal {
			t.Errorf("the call ended with %v", err)
		}
	})
	if t.Failed() {
		t.Logf("what the server logged:\n%s", server.output())
	}
}

// grpcClient calls methods whose messages are bytes.
type grpcClient struct{ *grpc.ClientConn }

func dialGRPC(t *testing.T, w *web, f form) grpcClient {
	t.Helper()
	scheme, address, _ := strings.Cut(strings.TrimSuffix(f.url, "/"), "://")
	secret := insecure.NewCredentials()
	if scheme == "https" {
		secret = credentials.NewTLS(&tls.Config{RootCAs: w.roots})
	}
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(secret),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return dialLoopback(ctx, "tcp", addr) }),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(bytesCodec{}), grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return grpcClient{conn}
}

func (c grpcClient) call(ctx context.Context, method string, in []byte, opts ...grpc.CallOption) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var out []byte
	err := c.Invoke(ctx, "/test.Echo/"+method, &in, &out, opts...)
	return out, err
}

// stream opens a call that streams, and sends what is given as its only message.
func (c grpcClient) stream(ctx context.Context, method string, only ...[]byte) (grpc.ClientStream, error) {
	s, err := c.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/test.Echo/"+method)
	for _, message := range only {
		if err == nil {
			err = errors.Join(s.SendMsg(&message), s.CloseSend())
		}
	}
	return s, err
}

type bytesCodec struct{ encoding.Codec }

func (bytesCodec) Name() string                       { return "bytes" }
func (bytesCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (bytesCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = bytes.Clone(data); return nil }

func callGRPC(t *testing.T, client grpcClient, server *session) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<17)

	t.Run("unary, with metadata both ways", func(t *testing.T) {
		var header, trailer metadata.MD
		ctx := metadata.AppendToOutgoingContext(ctx, "x-word", "Baum", "x-raw-bin", "\x00\x01\xfe")
		got, err := client.call(ctx, "Unary", big, grpc.Header(&header), grpc.Trailer(&trailer))
		if err != nil || !bytes.Equal(got, big) {
			t.Fatalf("%d bytes came back as %d, %v", len(big), len(got), err)
		}
		if w, r := header["x-word"], header["x-raw-bin"]; len(w) != 1 || w[0] != "Baum" || len(r) != 1 || r[0] != "\x00\x01\xfe" {
			t.Errorf("the server sent the header %v", header)
		}
		if l := trailer["x-last-bin"]; len(l) != 1 || l[0] != "\x00\xff" {
			t.Errorf("the server sent the trailer %v", trailer)
		}
		if host := trailer["x-host"]; len(host) != 1 || !strings.Contains(client.Target(), host[0]) || host[0] == "" {
			t.Errorf("the server was called as %v", host)
		}
	})
	t.Run("many at once on one connection", func(t *testing.T) {
		failed := make(chan error, 50)
		for i := range cap(failed) {
			go func() {
				in := fmt.Appendf(nil, "call %d", i)
				got, err := client.call(ctx, "Unary", in)
				if err == nil && !bytes.Equal(got, in) {
					err = fmt.Errorf("%q came back as %q", in, got)
				}
				failed <- err
			}()
		}
		for range cap(failed) {
			if err := <-failed; err != nil {
				t.Error(err)
			}
		}
	})
	t.Run("errors with their text, in the trailer", func(t *testing.T) {
		var trailer metadata.MD
		_, err := client.call(ctx, "Fail", nil, grpc.Trailer(&trailer))
		s := status.Convert(err)
		if s.Code() != codes.FailedPrecondition || s.Message() != "no: 100 % größer" {
			t.Errorf("error %v", err)
		}
		if why := trailer["x-why"]; len(why) != 1 || why[0] != "because" {
			t.Errorf("trailer %v", trailer)
		}
		if _, err := client.call(ctx, "NoSuchMethod", nil); status.Code(err) != codes.Unimplemented {
			t.Errorf("unknown method: %v", err)
		}
	})
	t.Run("the server streams message by message", func(t *testing.T) {
		ticks, err := client.stream(ctx, "Ticks", []byte("15"))
		if err != nil {
			t.Fatal(err)
		}
		var tick []byte
		for range 15 {
			if err := ticks.RecvMsg(&tick); err != nil {
				t.Fatal(err)
			}
			sent, err := strconv.ParseFloat(string(tick), 64)
			if late := time.Since(time.UnixMicro(int64(sent * 1e6))); err != nil || late > lateness {
				t.Errorf("a message came %s after it was sent, %v", late, err)
			}
		}
		if err := ticks.RecvMsg(&tick); err != io.EOF {
			t.Errorf("after the last message: %v", err)
		}
	})
	t.Run("the client streams", func(t *testing.T) {
		total, err := client.stream(ctx, "Total")
		if err != nil {
			t.Fatal(err)
		}
		for range 20 {
			if err := total.SendMsg(&big); err != nil {
				t.Fatal(err)
			}
		}
		total.CloseSend()
		var sum []byte
		if err := total.RecvMsg(&sum); err != nil || string(sum) != fmt.Sprint(20*len(big)) {
			t.Errorf("total %s, %v", sum, err)
		}
	})
	t.Run("both talk in turn", func(t *testing.T) {
		talk, err := client.stream(ctx, "Talk")
		if err != nil {
			t.Fatal(err)
		}
		for i := range 100 {
			said, heard := fmt.Appendf(nil, "word %d", i), []byte(nil)
			if err := errors.Join(talk.SendMsg(&said), talk.RecvMsg(&heard)); err != nil || !bytes.Equal(said, heard) {
				t.Fatalf("said %q, heard %q, %v", said, heard, err)
			}
		}
		talk.CloseSend()
		if err := talk.RecvMsg(new([]byte)); err != io.EOF {
			t.Errorf("after both have ended: %v", err)
		}
	})
	for what, end := range map[string]struct {
		limit time.Duration
		want  codes.Code
	}{"deadline": {time.Second, codes.DeadlineExceeded}, "cancellation": {time.Minute, codes.Canceled}} {
		t.Run("the server learns of a "+what, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(ctx, end.limit)
			defer cancel()
			name := what + " on " + client.Target()
			wait, err := client.stream(ctx, "Wait", []byte(name))
			if err != nil {
				t.Fatal(err)
			}
			var left []byte
			if err := wait.RecvMsg(&left); err != nil {
				t.Fatal(err)
			}
			if seconds, err := strconv.ParseFloat(string(left), 64); err != nil || seconds > end.limit.Seconds() || seconds < end.limit.Seconds()/2 {
				t.Errorf("the server sees %s s left of %s", left, end.limit)
			}
			if what == "cancellation" {
				cancel()
			}
			if err := wait.RecvMsg(&left); status.Code(err) != end.want {
				t.Errorf("the call ended with %v", err)
			}
			server.says("cancelled " + name)
		})
	}
}
