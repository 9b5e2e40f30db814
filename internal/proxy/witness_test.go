package proxy_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/server"
)

// front is the platform's own front before sandboxes A and B: what a client's
// bytes go through on their way, and nothing else.
type front struct {
	*sandboxes
	plain, tls string // addresses
}

func newFront(t *testing.T) *front {
	t.Helper()
	f := &front{sandboxes: &sandboxes{addrs: map[string]netip.Addr{
		idA: netip.MustParseAddr("127.0.0.1"),
		idB: netip.MustParseAddr("127.0.0.2"),
	}}}
	srv := server.New(server.Config{
		Proxy: proxy.New(proxy.Config{Resolver: f.sandboxes, Domain: "wrenn.test"}),
		API:   http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "api "+r.RequestURI) }),
	})
	borrowed := httptest.NewTLSServer(nil)
	certificate := borrowed.TLS.Certificates[0]
	borrowed.Close()
	var l server.Listeners
	for addr, listeners := range map[*string]*[]net.Listener{&f.plain: &l.Plain, &f.tls: &l.TLS} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		*addr, *listeners = ln.Addr().String(), []net.Listener{ln}
	}
	l.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate}}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		srv.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return f
}

// patience is how long a test waits for an answer that may not come.
const patience = 2 * time.Second

// send writes bytes to the front and reads what comes back. Where the front keeps
// the connection after the first answer, one more request follows on it, as from a
// client that means no harm: what was left of the bytes would get into its way. An
// empty one means none.
func (f *front) send(t *testing.T, request, last string) []*http.Response {
	t.Helper()
	conn, err := net.Dial("tcp", f.plain)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	_, _ = io.WriteString(conn, request) // the front may have closed already
	var answers []*http.Response
	br := bufio.NewReader(conn)
	for {
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			return answers
		}
		body, err := io.ReadAll(res.Body)
		res.Body = io.NopCloser(bytes.NewReader(body))
		answers = append(answers, res)
		if err != nil || res.Close || last == "" {
			return answers
		}
		if len(answers) == 1 {
			_, _ = io.WriteString(conn, last)
		}
	}
}

// field is a header field of HTTP/2 as it is sent, names and values unchecked.
type field struct{ name, value string }

// send2 sends one request over HTTP/2 and returns the answer's status; 0 when the
// stream or the connection was broken off instead.
func (f *front) send2(t *testing.T, fields []field, body ...string) int {
	t.Helper()
	conn, err := net.Dial("tcp", f.plain)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, h := range fields {
		if err := encoder.WriteField(hpack.HeaderField{Name: h.name, Value: h.value}); err != nil {
			t.Fatal(err)
		}
	}
	io.WriteString(conn, http2.ClientPreface)
	framer := http2.NewFramer(conn, conn)
	framer.AllowIllegalWrites = true
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	err = errors.Join(framer.WriteSettings(), framer.WriteHeaders(http2.HeadersFrameParam{
		StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: len(body) == 0,
	}))
	for i, part := range body {
		err = errors.Join(err, framer.WriteData(1, i == len(body)-1, []byte(part)))
	}
	if err != nil {
		return 0 // the front has closed already
	}
	status := 0
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			return 0
		}
		switch frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			if v := frame.PseudoValue("status"); v != "" {
				status, _ = strconv.Atoi(v)
			}
			if frame.StreamEnded() {
				return status
			}
		case *http2.DataFrame:
			if frame.StreamEnded() {
				return status
			}
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			return 0
		}
	}
}

// witness is an application that keeps the bytes of every connection and answers
// what it takes for requests.
type witness struct {
	port uint16

	mu    sync.Mutex
	conns []*bytes.Buffer
}

func newWitness(t *testing.T) *witness {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &witness{port: uint16(ln.Addr().(*net.TCPAddr).Port)}
	ctx, stop := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			seen := &bytes.Buffer{}
			w.mu.Lock()
			w.conns = append(w.conns, seen)
			w.mu.Unlock()
			serving.Go(func() {
				defer context.AfterFunc(ctx, func() { conn.Close() })()
				defer conn.Close()
				w.serve(conn, seen)
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		stop()
		serving.Wait()
	})
	return w
}

func (w *witness) serve(conn net.Conn, seen *bytes.Buffer) {
	br := bufio.NewReader(io.TeeReader(conn, lockedWriter{&w.mu, seen}))
	for {
		r, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		text := fmt.Sprintf("%s %s %d", r.Method, r.RequestURI, len(body))
		if r.Method == http.MethodHead {
			text = ""
		}
		fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
	}
}

type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l lockedWriter) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

// take returns the requests that came since the last time, as the strictest of
// readers sees them: "METHOD target body" each, or what is wrong with the bytes. A
// connection that goes on is kept for the next time.
func (w *witness) take() (requests []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, conn := range w.conns {
		for rest := conn.String(); rest != ""; {
			var request string
			request, rest = readStrictly(rest)
			requests = append(requests, request)
		}
		conn.Reset()
	}
	return requests
}

var (
	requestLine = regexp.MustCompile(`^([A-Z]+) ([^\x00-\x20\x7f]+) HTTP/1\.1$`)
	headerLine  = regexp.MustCompile("^([!#$%&'*+.^_`|~0-9A-Za-z-]+): ([^\\x00-\\x08\\x0a-\\x1f\\x7f]*)$")
)

// readStrictly reads one request off the beginning of some bytes. Whatever another
// reader could understand in another way is an error, which takes all the rest.
func readStrictly(b string) (request, rest string) {
	header, rest, whole := strings.Cut(b, "\r\n\r\n")
	if !whole {
		return "cut off: " + b, ""
	}
	lines := strings.Split(header, "\r\n")
	first := requestLine.FindStringSubmatch(lines[0])
	if first == nil {
		return fmt.Sprintf("bad request line: %q", lines[0]), ""
	}
	fields := map[string][]string{}
	for _, line := range lines[1:] {
		m := headerLine.FindStringSubmatch(line)
		if m == nil || m[2] != strings.Trim(m[2], " \t") {
			return fmt.Sprintf("bad header line: %q", line), ""
		}
		name := strings.ToLower(m[1])
		fields[name] = append(fields[name], m[2])
	}
	request = first[1] + " " + first[2] + " "
	length, coding := fields["content-length"], fields["transfer-encoding"]
	switch {
	case len(fields["host"]) != 1:
		return fmt.Sprintf("hosts: %q", fields["host"]), ""
	case len(length)+len(coding) > 1:
		return fmt.Sprintf("more than one framing: %q %q", length, coding), ""
	case len(coding) == 1 && coding[0] != "chunked":
		return fmt.Sprintf("transfer coding %q", coding[0]), ""
	case len(coding) == 1:
		body, rest, err := readChunks(rest)
		if err != "" {
			return request + err, ""
		}
		return request + body, rest
	case len(length) == 1:
		n, err := strconv.ParseUint(length[0], 10, 31)
		if err != nil || length[0] != strconv.FormatUint(n, 10) {
			return fmt.Sprintf("content length %q", length[0]), ""
		}
		if uint64(len(rest)) < n {
			return request + "cut off", ""
		}
		return request + rest[:n], rest[n:]
	}
	return request, rest
}

func readChunks(b string) (body, rest, err string) {
	for {
		size, after, whole := strings.Cut(b, "\r\n")
		n, parseErr := strconv.ParseUint(size, 16, 31)
		switch {
		case !whole:
			return "", "", "cut off"
		case parseErr != nil || strings.TrimLeft(size, "0123456789abcdef") != "":
			return "", "", fmt.Sprintf("bad chunk size %q", size)
		case n == 0:
			for {
				line, after2, whole := strings.Cut(after, "\r\n")
				if after = after2; !whole {
					return "", "", "cut off"
				}
				if line == "" {
					return body, after, ""
				}
				if !headerLine.MatchString(line) {
					return "", "", fmt.Sprintf("bad trailer line: %q", line)
				}
				body += " + trailer " + line
			}
		case uint64(len(after)) < n+2:
			return "", "", "cut off"
		case after[n:n+2] != "\r\n":
			return "", "", "a chunk without an end"
		}
		body, b = body+after[:n], after[n+2:]
	}
}
