package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
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
	mux := http.NewServeMux()
	mux.HandleFunc("GET /messages", echoWebSocket)
	mux.HandleFunc("POST /messages", echoStream)
	mux.HandleFunc("GET /poll", func(w http.ResponseWriter, _ *http.Request) { w.Write(pollAnswer) })
	mux.HandleFunc("GET /download", func(w http.ResponseWriter, _ *http.Request) {
		block := make([]byte, 64<<10)
		for {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("POST /upload", func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // until the client leaves
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if _, err := fmt.Fprintln(out, l.Addr()); err != nil {
		return err
	}
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
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
