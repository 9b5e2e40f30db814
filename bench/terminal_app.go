package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/coder/websocket"
)

// terminalAppPort is where the application listens in the sandbox.
const terminalAppPort = 8080

// messageSize is that of every message over a WebSocket, in bytes.
const messageSize = 256

// pollAnswer is what a poll gets: about as much as the state of a notebook.
var pollAnswer = make([]byte, 1<<10)

// ServeTerminalApp is the application whose traffic goes past the terminal. The
// benchmark copies its own program into the sandbox to run it there. It prints a
// line when it serves, and ends with ctx.
func ServeTerminalApp(ctx context.Context, out io.Writer) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", fmt.Sprintf(":%d", terminalAppPort))
	if err != nil {
		return err
	}
	server := &http.Server{Handler: terminalApp(), ReadHeaderTimeout: 10 * time.Second}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if _, err := fmt.Fprintln(out, l.Addr()); err != nil {
		return err
	}
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func terminalApp() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /messages", echoWebSocket)
	mux.HandleFunc("POST /messages", echoStream)
	mux.HandleFunc("GET /poll", func(w http.ResponseWriter, _ *http.Request) { w.Write(pollAnswer) })
	mux.HandleFunc("POST /upload", func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // until the client leaves
	})
	d := downloads{writing: make(map[*http.Request]time.Time)}
	mux.HandleFunc("GET /download", d.serve)
	mux.HandleFunc("GET /blocked", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, d.blocked()) })
	return mux
}

// downloads never end by themselves.
type downloads struct {
	mu      sync.Mutex
	writing map[*http.Request]time.Time // since when each waits for its client to read
}

func (d *downloads) serve(w http.ResponseWriter, r *http.Request) {
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.writing, r)
	}()
	block := make([]byte, transferUnit)
	for {
		d.mu.Lock()
		d.writing[r] = time.Now()
		d.mu.Unlock()
		if _, err := w.Write(block); err != nil {
			return
		}
	}
}

// blocked is how many downloads have not moved for a while: all buffers on the
// way to their readers are full.
func (d *downloads) blocked() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for _, since := range d.writing {
		if time.Since(since) > 500*time.Millisecond {
			n++
		}
	}
	return n
}

func echoWebSocket(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
	if err != nil {
		return // Accept has answered
	}
	defer conn.CloseNow() //nolint:errcheck // the client is gone
	stream := websocket.NetConn(r.Context(), conn, websocket.MessageBinary)
	echoMessages(stream, stream, func() error { return nil })
}

// echoStream is a WebSocket for those who cannot upgrade: messages in both
// directions over one exchange.
func echoStream(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	if err := control.EnableFullDuplex(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if control.Flush() != nil {
		return
	}
	echoMessages(r.Body, w, control.Flush)
}

func echoMessages(in io.Reader, out io.Writer, flush func() error) {
	message := make([]byte, messageSize)
	for {
		if _, err := io.ReadFull(in, message); err != nil {
			return
		}
		if _, err := out.Write(message); err != nil {
			return
		}
		if flush() != nil {
			return
		}
	}
}
