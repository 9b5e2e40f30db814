package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os/user"
	"sync/atomic"
	"time"
)

// wire speaks to a bare guest agent as the JavaScript SDK does: Connect with JSON
// over HTTP/1.1. It is written out here rather than left to an RPC library so
// that the time measured is the agent's and not the client's.
type wire struct {
	url   string
	http  *http.Client
	dials *atomic.Int32 // connections made so far
	token string
	user  string // whom the agent acts as: who runs the benchmark

	header http.Header // further fields of every request: what a platform routes by
}

func newWire(address string) *wire {
	w := &wire{url: "http://" + address, user: "root"}
	w.http, w.dials = loopbackClient()
	if me, err := user.Current(); err == nil {
		w.user = me.Username
	}
	return w
}

// loopbackClient is the client that everything is measured with, the agent and
// its floors. It counts the connections that it makes.
func loopbackClient() (*http.Client, *atomic.Int32) {
	dials := new(atomic.Int32)
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, address)
			if err == nil {
				dials.Add(1)
			}
			return conn, err
		},
		Protocols:           protocols,
		MaxIdleConnsPerHost: 8,
		DisableCompression:  true,
		WriteBufferSize:     64 << 10,
		ReadBufferSize:      64 << 10,
	}}, dials
}

// request sends a request; an answer other than the wanted is an error.
func (w *wire) request(ctx context.Context, method, path, contentType string, body io.Reader, length int64, want int) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, method, w.url+path, body)
	if err != nil {
		return nil, err
	}
	maps.Copy(r.Header, w.header)
	r.ContentLength = length
	r.SetBasicAuth(w.user, "")
	if w.token != "" {
		r.Header.Set("X-Access-Token", w.token)
	}
	if contentType != "" {
		r.Header.Set("Content-Type", contentType)
		r.Header.Set("Connect-Protocol-Version", "1")
	}
	return do(w.http, r, want)
}

func do(c *http.Client, r *http.Request, want int) (*http.Response, error) {
	resp, err := c.Do(r)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != want {
		defer resp.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
		return nil, fmt.Errorf("%s %s: %s: %s", r.Method, r.URL.Path, resp.Status, bytes.TrimSpace(text))
	}
	return resp, nil
}

// finish reads the rest of an answer, so that its connection can be used again.
func finish(resp *http.Response, err error) error {
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

func (w *wire) health(ctx context.Context) error {
	return finish(w.request(ctx, http.MethodGet, "/health", "", nil, 0, http.StatusNoContent))
}

// init gives the agent a token, without which it lets every user of the machine in.
func (w *wire) init(ctx context.Context, token string) error {
	body, err := json.Marshal(map[string]any{"accessToken": token, "defaultUser": w.user, "timestamp": time.Now()})
	if err != nil {
		return err
	}
	err = finish(w.request(ctx, http.MethodPost, "/init", "application/json", bytes.NewReader(body), int64(len(body)), http.StatusNoContent))
	w.token = token
	return err
}

// startRequest has the fields of StartRequest that are used here.
type startRequest struct {
	Process struct {
		Cmd  string   `json:"cmd"`
		Args []string `json:"args,omitempty"`
		Cwd  string   `json:"cwd"`
	} `json:"process"`
	Stdin bool         `json:"stdin"`
	Pty   *ptyOfClient `json:"pty,omitempty"`
}

type ptyOfClient struct {
	Size struct {
		Cols uint32 `json:"cols"`
		Rows uint32 `json:"rows"`
	} `json:"size"`
}

func command(dir, path string, args ...string) startRequest {
	var r startRequest
	r.Process.Cmd, r.Process.Args, r.Process.Cwd = path, args, dir
	return r
}

// event is one of a process's; exactly one field is set, except for keepalives.
type event struct {
	Start *struct {
		PID uint32 `json:"pid"`
	} `json:"start"`
	Data *output `json:"data"`
	End  *struct {
		ExitCode int    `json:"exitCode"`
		Exited   bool   `json:"exited"`
		Status   string `json:"status"`
	} `json:"end"`
}

// output has one field set.
type output struct {
	Stdout []byte `json:"stdout"`
	Stderr []byte `json:"stderr"`
	Pty    []byte `json:"pty"`
}

// events is a stream of process events.
type events struct {
	body    io.ReadCloser
	in      *bufio.Reader
	payload []byte
	data    []byte // decoded output
	pid     uint32
}

// start runs a command and returns when its start event is here.
func (w *wire) start(ctx context.Context, request startRequest) (*events, error) {
	message, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	body := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))
	body = append(body, message...)
	resp, err := w.request(ctx, http.MethodPost, "/process.Process/Start", "application/connect+json", //nolint:bodyclose // events.close does
		bytes.NewReader(body), int64(len(body)), http.StatusOK)
	if err != nil {
		return nil, err
	}
	s := &events{body: resp.Body, in: bufio.NewReaderSize(resp.Body, 64<<10)}
	first, err := s.next()
	if err == nil && first.Start == nil {
		err = errors.New("the first event is not the start")
	}
	if err != nil {
		s.close()
		return nil, err
	}
	s.pid = first.Start.PID
	return s, nil
}

// next returns the next event, whose output is good until the one after. At the
// regular end of the stream the error is io.EOF.
func (s *events) next() (event, error) {
	var header [5]byte
	if _, err := io.ReadFull(s.in, header[:]); err != nil {
		return event{}, fmt.Errorf("read stream: %w", io.ErrUnexpectedEOF)
	}
	size := int(binary.BigEndian.Uint32(header[1:]))
	if cap(s.payload) < size {
		s.payload = make([]byte, size)
	}
	s.payload = s.payload[:size]
	if _, err := io.ReadFull(s.in, s.payload); err != nil {
		return event{}, fmt.Errorf("read stream: %w", err)
	}
	if last := header[0]&2 != 0; last {
		if bytes.Contains(s.payload, []byte(`"error"`)) {
			return event{}, fmt.Errorf("stream failed: %s", s.payload)
		}
		// Read to the very end, so that the connection can be used again.
		if _, err := s.in.ReadByte(); !errors.Is(err, io.EOF) {
			return event{}, fmt.Errorf("stream goes on after its end: %w", err)
		}
		return event{}, io.EOF
	}
	if encoded, ok := stdoutOf(s.payload); ok {
		var err error
		if s.data, err = base64.StdEncoding.AppendDecode(s.data[:0], encoded); err != nil {
			return event{}, fmt.Errorf("read output: %w", err)
		}
		return event{Data: &output{Stdout: s.data}}, nil
	}
	var message struct{ Event event }
	if err := json.Unmarshal(s.payload, &message); err != nil {
		return event{}, fmt.Errorf("read event: %w", err)
	}
	return message.Event, nil
}

// stdoutOf takes the output out of a message by hand: encoding/json looks at each
// byte several times, and would be what limits a stream. The only field that is
// called stdout is near the start of its message, and base64 has no quotes.
func stdoutOf(message []byte) (encoded []byte, ok bool) {
	const field = `"stdout":`
	at := bytes.Index(message[:min(len(message), 64)], []byte(field))
	if at < 0 {
		return nil, false
	}
	rest, ok := bytes.CutPrefix(bytes.TrimLeft(message[at+len(field):], " "), []byte{'"'})
	if !ok {
		return nil, false
	}
	encoded, _, ok = bytes.Cut(rest, []byte{'"'})
	return encoded, ok
}

// end returns nil for a process that exited with 0 and a stream that ended well;
// ev is the end event.
func (s *events) end(ev event) error {
	if !ev.End.Exited || ev.End.ExitCode != 0 {
		return fmt.Errorf("process ended with %q", ev.End.Status)
	}
	if _, err := s.next(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("stream does not end: %w", err)
	}
	return nil
}

func (s *events) close() { s.body.Close() }

// sendInput writes to a process's terminal.
func (w *wire) sendInput(ctx context.Context, pid uint32, data []byte) error {
	body := fmt.Appendf(nil, `{"process":{"pid":%d},"input":{"pty":"%s"}}`, pid, base64.StdEncoding.EncodeToString(data))
	return finish(w.request(ctx, http.MethodPost, "/process.Process/SendInput", "application/json",
		bytes.NewReader(body), int64(len(body)), http.StatusOK))
}

// kill ends a process with SIGKILL.
func (w *wire) kill(ctx context.Context, pid uint32) error {
	body := fmt.Appendf(nil, `{"process":{"pid":%d},"signal":"SIGNAL_SIGKILL"}`, pid)
	return finish(w.request(ctx, http.MethodPost, "/process.Process/SendSignal", "application/json",
		bytes.NewReader(body), int64(len(body)), http.StatusOK))
}

func filePath(path string) string { return "/files?" + url.Values{"path": {path}}.Encode() }
