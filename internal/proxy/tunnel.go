package proxy

import (
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/wrenn/wrenn/internal/tunnel"
)

// agentForwardPort is where the guest agent takes what it forwards to programs that
// listen on the loopback.
const agentForwardPort = 49984

// tunnelPing is how often an idle WebSocket tunnel shows those on the way that it
// is alive. Many end what has been silent for a minute.
const tunnelPing = 30 * time.Second

// connects reports whether a request is a CONNECT for a tunnel: of HTTP/1, or the
// plain one of HTTP/2 (RFC 9113, 8.5). The extended one (RFC 8441) names a protocol
// and a path.
func connects(r *http.Request) bool {
	return r.Method == http.MethodConnect && len(r.Header[":protocol"]) == 0
}

// tunnels reports whether a request is for the bare port of a sandbox, by CONNECT
// or by a WebSocket with the subprotocol of package tunnel.
func tunnels(r *http.Request) bool { return connects(r) || tunnel.Asked(r) }

// refuseTunnel says why there can be no tunnel; nil when there can.
func refuseTunnel(w http.ResponseWriter, r *http.Request, d Destination) *failure {
	if r.Method == http.MethodConnect && r.ProtoMajor == 1 {
		w.Header().Set("Connection", "close") // what follows a CONNECT that fails may be meant for the port
	}
	f := &failure{SandboxID: d.SandboxID, Port: d.Port, Code: http.StatusForbidden}
	switch {
	case d.Port == AgentPort || d.Port == agentForwardPort:
		// Some routes of the guest agent are its host's. They are guarded request by
		// request: nobody gets a connection to it that nothing looks into.
		f.Message = "The guest agent's ports are not reached through tunnels"
	case foreignOrigin(r):
		// The application behind a WebSocket looks at Origin itself; what is behind
		// a tunnel never sees it.
		f.Message = "Pages of another origin may not open tunnels"
	case connects(r) && malformedConnect(r):
		f.Code, f.Message = http.StatusBadRequest, "A CONNECT request names host and port, and has no body"
	default:
		return nil
	}
	return f
}

func foreignOrigin(r *http.Request) bool {
	for _, value := range r.Header["Origin"] {
		if origin, err := url.Parse(value); err != nil || !strings.EqualFold(origin.Host, r.Host) {
			return true
		}
	}
	return false
}

// malformedConnect reports whether an HTTP/1 request has what no CONNECT has: a
// path, or a body, which one of two parties would take for the tunnel's bytes. In
// HTTP/2 what follows the header is the tunnel's.
func malformedConnect(r *http.Request) bool {
	return r.ProtoMajor == 1 &&
		(strings.HasPrefix(r.RequestURI, "/") || r.ContentLength != 0 || len(r.TransferEncoding) > 0)
}

// tunnel makes one connection of the client's and one to the sandbox's port. The
// error says that there is none to the port; then nothing has been sent to the
// client.
func (p *Proxy) tunnel(s *stream, r *http.Request) error {
	overWebSocket := !connects(r)
	header := make(http.Header)
	if overWebSocket {
		if err := tunnel.Agree(r, header); err != nil {
			s.fail(r, failure{SandboxID: s.dest.SandboxID, Message: err.Error(), Port: s.dest.Port, Code: http.StatusBadRequest})
			return nil
		}
	}
	conn, first, err := p.dialTunnel(s)
	if err != nil {
		return err
	}
	defer conn.Close()
	s.Header().Del("Connection")
	for name, values := range header {
		s.Header()[name] = values
	}
	ends := &tunnelEnds{stream: s, guest: conn, first: first}
	if s.http1 {
		s.tunnelConn(ends, overWebSocket)
	} else {
		s.tunnelStream(ends, overWebSocket, r.Body)
	}
	return nil
}

// tunnelConn makes the client's connection the tunnel.
func (s *stream) tunnelConn(ends *tunnelEnds, overWebSocket bool) {
	status := http.StatusOK
	if overWebSocket {
		status = http.StatusSwitchingProtocols
	}
	client, early, err := s.takeOver(status)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	defer client.Close()
	s.switched()
	ends.client, ends.early = client, early
	if overWebSocket {
		ws := tunnel.New(client, tunnel.Config{Early: early, Wait: waiterOf(client)})
		defer ws.Close()
		ws.KeepAlive(tunnelPing)
		ends.client, ends.early = ws, nil
	}
	_ = ends.join() // an error has been passed on as a broken connection
}

// tunnelStream makes the client's HTTP/2 stream the tunnel.
func (s *stream) tunnelStream(ends *tunnelEnds, overWebSocket bool, body io.Reader) {
	client := &streamEnd{stream: s, body: body}
	ends.client = client
	if overWebSocket {
		ws := tunnel.New(client, tunnel.Config{})
		defer ws.Close()
		ws.KeepAlive(tunnelPing)
		ends.client = ws
	}
	s.WriteHeader(http.StatusOK)
	s.switched()
	s.flush()
	if err := ends.join(); err != nil {
		panic(http.ErrAbortHandler) // resets the stream
	}
	client.done = true
}

// tunnelEnds are the two connections that a tunnel joins, and what has been read of
// them already.
type tunnelEnds struct {
	stream       *stream
	client       io.ReadWriteCloser
	guest        *guestConn
	early, first []byte // of the client, of the guest
}

// join carries bytes until both directions have ended. An end that breaks breaks
// the other one: a proper end would say that what came is all there was.
func (t *tunnelEnds) join() error {
	s := t.stream
	broken := func() {
		breakOff(t.guest.Conn)
		if ws, ok := t.client.(interface{ Abort() }); ok {
			ws.Abort() // may take a while
		} else {
			breakOff(t.client)
		}
	}
	_, err := t.guest.Write(t.early)
	if err == nil {
		_, err = t.client.Write(t.first)
	}
	if err != nil {
		broken()
		return err
	}
	s.received.Add(int64(len(t.early)))
	s.sent.Add(int64(len(t.first)))
	return splice(t.client, t.guest.Conn, s, broken)
}

// streamEnd is the client's end on an HTTP/2 stream: bytes come as the body of the
// request and go as the body of the answer.
type streamEnd struct {
	stream *stream
	body   io.Reader
	ended  atomic.Bool
	done   bool // it has come to its proper end
}

func (e *streamEnd) Read(b []byte) (int, error) {
	n, err := e.body.Read(b)
	if err != nil && e.ended.Load() {
		err = io.EOF
	}
	return n, err
}

func (e *streamEnd) Write(b []byte) (int, error) {
	n, err := e.stream.ResponseWriter.Write(b)
	if err == nil {
		err = http.NewResponseController(e.stream.ResponseWriter).Flush()
	}
	return n, err
}

// CloseWrite ends both directions: net/http ends a stream only when its handler
// returns, and reads nothing of it from then on. What the client has sent until now
// gets to the port.
func (e *streamEnd) CloseWrite() error {
	e.ended.Store(true)
	e.stream.stopUpload()
	return nil
}

// Close ends what waits for the client; the handler then resets the stream.
func (e *streamEnd) Close() error {
	if e.done {
		return nil
	}
	past := time.Unix(1, 0)
	client := http.NewResponseController(e.stream.ResponseWriter)
	return errors.Join(client.SetReadDeadline(past), client.SetWriteDeadline(past))
}
