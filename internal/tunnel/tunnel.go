// Package tunnel carries a TCP connection over a WebSocket (RFC 6455), for clients
// behind load balancers and proxies that know no CONNECT. The platform's proxy has
// one end and a client the other.
//
// Binary messages carry bytes, both ways; where one message ends and the next
// begins means nothing. An empty text message is the end of its sender's direction,
// as TCP's FIN is: the other direction goes on. When both have ended, the
// connection is closed with code 1000. A connection that ends otherwise is broken:
// what came is not all that there was. The codes of this package say why.
//
// The framing is the package's own because of what general libraries do to a
// connection that stands still: they hold buffers for it, and give it up when the
// answer to a ping cannot be written within seconds, which is all that happens when
// a reader takes its time.
package tunnel

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// Protocol is the WebSocket subprotocol that asks for a tunnel.
const Protocol = "tcp.wrenn"

// Codes with which a tunnel is closed.
const (
	CodeDone          = 1000 // both directions have ended; sent by a client earlier: it wants no more
	CodeProtocolError = 1002
	CodeUnsupported   = 1003 // a text message with something in it
	CodeTooLarge      = 1009 // a message of more than MaxMessage
	CodeReset         = 4000 // the connection at the other end was reset
)

const (
	// MaxMessage bounds the messages that are taken, in bytes. They are passed on as
	// they come, so it is no bound of what is held.
	MaxMessage = 1 << 20

	maxFrame = 64 << 10 // that are sent
	// closeTimeout is how long a last word may take to be sent.
	closeTimeout = 5 * time.Second
)

// CloseError is the reason that the other end gave for ending a tunnel that had not
// come to its end.
type CloseError struct {
	Code   uint16
	Reason string
}

func (e *CloseError) Error() string {
	if e.Reason == "" {
		return fmt.Sprintf("the tunnel was closed with code %d", e.Code)
	}
	return fmt.Sprintf("the tunnel was closed: %s (%d)", e.Reason, e.Code)
}

var (
	errClosed = errors.New("the tunnel is closed")
	errEnded  = errors.New("write to a tunnel after the end of its direction")
)

// Config is what New needs.
type Config struct {
	Client bool   // this end made the request for the WebSocket
	Early  []byte // what has been read from the connection already
	// Wait, unless nil, waits until the connection can be read, without reading.
	Wait func() error
}

// Conn is one end of a tunnel. One goroutine may read while another writes.
type Conn struct {
	conn    io.ReadWriteCloser
	client  bool
	wait    func() error
	decoder decoder
	early   []byte
	err     error // of reading; stays

	ended   atomic.Bool // the other end has ended its direction
	endSent atomic.Bool

	sending sync.Mutex
	closing bool                   // a close frame has been sent; guarded by sending
	pong    atomic.Pointer[[]byte] // the answer that is due to the last ping
	ponging sync.WaitGroup

	mu      sync.Mutex // guards the rest
	pinging *time.Timer
	closed  bool
}

// New makes a tunnel of a connection on which the handshake is done. Close ends it.
func New(conn io.ReadWriteCloser, cfg Config) *Conn {
	return &Conn{conn: conn, client: cfg.Client, early: cfg.Early, wait: cfg.Wait, decoder: decoder{client: cfg.Client}}
}

// Waiter returns a function that waits until there may be something to read, and
// holds no buffer meanwhile; nil where that cannot be told.
func (c *Conn) Waiter() func() error {
	if c.wait == nil {
		return nil
	}
	return c.await
}

func (c *Conn) await() error {
	if c.err != nil || c.ended.Load() || len(c.early) > 0 {
		return nil
	}
	return c.wait()
}

// Read implements io.Reader. It returns io.EOF when the other end has ended its
// direction, or wants no more; AwaitClose tells which.
func (c *Conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		switch {
		case c.ended.Load(), errors.Is(c.err, errDone):
			return 0, io.EOF
		case c.err != nil:
			return 0, c.err
		}
		if n := c.receive(p); n > 0 {
			return n, nil
		}
	}
}

// AwaitClose goes on with an end that has been read to its io.EOF: it answers pings
// and returns when the connection ends. The error is nil when it ended as it should,
// be it that the other end wants no more.
func (c *Conn) AwaitClose() error {
	buf := make([]byte, 256)
	for c.err == nil {
		if c.wait != nil && len(c.early) == 0 {
			if err := c.wait(); err != nil {
				c.err = err
				break
			}
		}
		c.receive(buf)
	}
	switch {
	case errors.Is(c.err, errDone):
		return nil
	case errors.Is(c.err, io.ErrUnexpectedEOF) && c.ended.Load() && c.endSent.Load():
		return nil // it has everything and only went without a word
	}
	return c.err
}

// receive reads once and returns how much of it is for the reader. What goes wrong
// is in c.err.
func (c *Conn) receive(p []byte) int {
	var n int
	var err error
	if len(c.early) > 0 {
		n = copy(p, c.early)
		if c.early = c.early[n:]; len(c.early) == 0 {
			c.early = nil
		}
	} else {
		n, err = c.conn.Read(p)
	}
	m, failed := c.decoder.decode(p[:n], c)
	switch {
	case failed != nil:
		c.err = failed
		c.answerFailure(failed)
	case errors.Is(err, io.EOF):
		c.err = io.ErrUnexpectedEOF
	case err != nil:
		c.err = err
	}
	return m
}

// answerFailure says why nothing more will be read.
func (c *Conn) answerFailure(err error) {
	var violation *violation
	if errors.As(err, &violation) {
		c.lastWord(violation.code, violation.reason)
	} else {
		c.lastWord(CodeDone, "") // in answer to the other end's
	}
}

// Write implements io.Writer. It returns when everything has been given to the
// connection.
func (c *Conn) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		piece := p[done:min(len(p), done+maxFrame)]
		if c.endSent.Load() {
			return done, errEnded
		}
		if err := c.send(opBinary, piece); err != nil {
			return done, err
		}
		done += len(piece)
	}
	return done, nil
}

// CloseWrite ends this end's direction. It is no error that the other end wants
// no more anyway.
func (c *Conn) CloseWrite() error {
	if c.endSent.Swap(true) {
		return nil
	}
	if err := c.send(opText, nil); err != nil && !errors.Is(err, errClosed) {
		return err
	}
	c.closeIfDone()
	return nil
}

// closeIfDone closes a connection both of whose directions have ended. It is the
// other end then that ends it, when it has read everything.
func (c *Conn) closeIfDone() {
	if c.ended.Load() && c.endSent.Load() {
		_ = c.send(opClose, closePayload(CodeDone, "")) // whoever is gone needs no word
	}
}

// send sends one frame. Nothing may follow a close frame.
func (c *Conn) send(op byte, payload []byte) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	return c.sendLocked(op, payload)
}

func (c *Conn) sendLocked(op byte, payload []byte) error {
	if c.closing {
		return errClosed
	}
	c.closing = op == opClose
	buf := frames.Get().(*[maxHeader + maxFrame]byte)
	defer frames.Put(buf)
	_, err := c.conn.Write(appendFrame(buf[:0], op, payload, c.client))
	return err
}

// lastWord sends a close frame unless the connection is stuck.
func (c *Conn) lastWord(code uint16, reason string) {
	if c.sending.TryLock() {
		defer c.sending.Unlock()
		_ = c.sendLocked(opClose, closePayload(code, reason)) // whoever is gone needs no word
	}
}

// Abort ends the tunnel because the connection at this end has been reset.
func (c *Conn) Abort() {
	late := time.AfterFunc(closeTimeout, func() { _ = c.conn.Close() })
	defer late.Stop()
	c.lastWord(CodeReset, "connection reset")
	_ = c.Close() // an error means that it is closed already
}

// KeepAlive sends a ping every so often, for those on the way who end connections
// that stand still. Close ends it.
func (c *Conn) KeepAlive(every time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.pinging != nil {
		return
	}
	c.pinging = time.AfterFunc(every, func() {
		if c.sending.TryLock() { // else there is traffic
			_ = c.sendLocked(opPing, nil) // an error comes up where it matters
			c.sending.Unlock()
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.closed {
			c.pinging.Reset(every)
		}
	})
}

// Close breaks the tunnel off if it has not come to its end, and releases what it
// has.
func (c *Conn) Close() error {
	c.mu.Lock()
	c.closed = true
	if c.pinging != nil {
		c.pinging.Stop()
	}
	c.mu.Unlock()
	err := c.conn.Close()
	c.ponging.Wait()
	c.sending.Lock() // a ping may be on its way
	defer c.sending.Unlock()
	c.closing = true
	return err
}

// end implements events: the other end has ended its direction.
func (c *Conn) end() {
	c.ended.Store(true)
	c.closeIfDone()
}

// ping implements events. The answer must not hold up the reader: the other end may
// read nothing for a while. Of several pings the last one is answered.
func (c *Conn) ping(payload []byte) {
	answer := append([]byte(nil), payload...)
	if c.pong.Swap(&answer) != nil {
		return // whoever is about to send takes the newer one
	}
	c.ponging.Go(func() {
		c.sending.Lock()
		defer c.sending.Unlock()
		_ = c.sendLocked(opPong, *c.pong.Swap(nil)) // an error comes up where it matters
	})
}
