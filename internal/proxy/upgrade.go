package proxy

import (
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/hangup"
)

// idleBuffer is what a direction holds that cannot wait without a buffer, in bytes.
const idleBuffer = 4 << 10

// upgrade makes the client's connection and the guest's one, after the guest has
// agreed to another protocol.
func (e *exchange) upgrade(res *http.Response) {
	c, s := e.conn, e.stream
	defer e.abandon()
	if agreed := res.Header.Get("Upgrade"); s.upgrade == "" || !strings.EqualFold(agreed, s.upgrade) {
		s.fail(e.request, notAnswered(s.dest))
		return
	}
	copyAnswerHeader(s.Header(), res)
	if s.extended {
		e.bridge()
		return
	}
	s.Header().Set("Connection", "Upgrade")
	s.Header().Set("Upgrade", res.Header.Get("Upgrade"))
	client, early, err := s.takeOver(http.StatusSwitchingProtocols)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	s.switched()
	defer client.Close()
	e.watch() // the server does not watch a connection that it has given away
	if len(early) > 0 {
		if _, err := c.Write(early); err != nil {
			return
		}
		s.received.Add(int64(len(early)))
	}
	if first := c.releaseBuffers(); len(first) > 0 {
		if _, err := client.Write(first); err != nil {
			return
		}
		s.sent.Add(int64(len(first)))
	}
	_ = splice(client, c.Conn, s, func() { // whoever is broken, the other one learns of it
		_ = client.Close() // errors mean that they were closed already
		_ = c.Conn.Close()
	})
}

// bridge carries a WebSocket between an HTTP/2 stream of the client and the guest.
func (e *exchange) bridge() {
	c, s := e.conn, e.stream
	delete(s.Header(), "Sec-Websocket-Accept")
	s.WriteHeader(http.StatusOK)
	s.switched()
	s.flush()
	var up sync.WaitGroup
	up.Go(func() {
		// A small buffer, for an idle one holds it too.
		if _, err := io.CopyBuffer(struct{ io.Writer }{c.guestConn}, s.upload, make([]byte, idleBuffer)); err != nil {
			e.conn.interrupt()
			return
		}
		_ = c.CloseWrite() // fails only on a closed connection
	})
	for {
		_, err := c.br.Peek(1)
		if err == nil {
			err = e.passOn()
		}
		if err == nil {
			continue
		}
		c.close()
		s.stopUpload()
		up.Wait()
		if !errors.Is(err, io.EOF) {
			panic(http.ErrAbortHandler)
		}
		return
	}
}

// passOn passes on what the guest has sent.
func (e *exchange) passOn() error {
	s := e.stream
	buf := s.proxy.buffers.Get()
	defer s.proxy.buffers.Put(buf)
	n, err := e.conn.br.Read(buf)
	if _, werr := s.ResponseWriter.Write(buf[:n]); werr != nil {
		return werr
	}
	s.sent.Add(int64(n))
	s.flush()
	return err
}

// leftTimeout is how long a guest may go on after its client has said that it wants
// no more: long enough for what the client sent last.
const leftTimeout = time.Minute

// splice carries bytes both ways until both directions have ended or one has
// failed: then it calls broken, which must end both connections. The end of one
// direction is passed on as such: some protocols go on talking in the other.
func splice(client, guest io.ReadWriteCloser, s *stream, broken func()) error {
	buffers := &s.proxy.buffers
	var up sync.WaitGroup
	var upErr error
	answered := make(chan struct{})
	up.Go(func() {
		if upErr = pump(guest, client, &s.received, buffers); upErr == nil {
			upErr = lookAfter(client, answered, broken)
		}
		if upErr != nil {
			broken()
		}
	})
	err := pump(client, guest, &s.sent, buffers)
	if err != nil {
		broken()
	}
	close(answered)
	up.Wait()
	return errors.Join(err, upErr)
}

// lookAfter waits for the end of a client that has ended its direction, where that
// takes more than the end of the other one.
func lookAfter(client io.Closer, answered <-chan struct{}, broken func()) error {
	c, ok := client.(interface{ AwaitClose() error })
	if conn, socket := client.(net.Conn); !ok && socket {
		return awaitHangup(conn, answered)
	}
	if !ok {
		return nil
	}
	if err := c.AwaitClose(); err != nil {
		return err
	}
	left := time.AfterFunc(leftTimeout, broken)
	defer left.Stop()
	<-answered
	return nil
}

// awaitHangup waits until a client that has ended its direction is gone, which is an
// error, or until the other direction has ended.
func awaitHangup(client net.Conn, answered <-chan struct{}) error {
	var err error
	ended := make(chan struct{})
	go func() { defer close(ended); err = hangup.Await(client) }()
	select {
	case <-ended:
		if err == nil {
			return syscall.ECONNRESET
		}
		<-answered // it cannot be told
	case <-answered:
		_ = client.SetReadDeadline(time.Unix(1, 0)) // fails only on a closed connection, whose wait ends as well
		<-ended
	}
	return nil
}

// pump copies until the source ends, which it passes on as half a close. An idle
// connection holds no buffer, or a small one: there may be ten thousands.
func pump(to io.Writer, from io.Reader, count *tally, buffers *bufferPool) error {
	wait := waiterOf(from)
	var small []byte
	if wait == nil {
		small = make([]byte, 4*idleBuffer) // a record of TLS
	}
	for {
		if wait != nil {
			if err := wait(); err != nil {
				return err
			}
		}
		n, err := pumpOnce(to, from, small, buffers)
		count.Add(int64(n))
		switch {
		case errors.Is(err, io.EOF):
			return closeWrite(to)
		case err != nil:
			return err
		}
	}
}

// pumpOnce carries what can be read at once, through own or a buffer that it borrows.
func pumpOnce(to io.Writer, from io.Reader, own []byte, buffers *bufferPool) (int, error) {
	buf := own
	if buf == nil {
		buf = buffers.Get()
		defer buffers.Put(buf)
	}
	n, err := from.Read(buf)
	if n > 0 {
		if _, werr := to.Write(buf[:n]); werr != nil {
			err = werr
		}
	}
	return n, err
}

// closeWrite ends one direction; where a connection has no such thing, all of it.
func closeWrite(c any) error {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errHalfClose
}

var errHalfClose = errors.New("the connection cannot be closed in one direction only")

// waiterOf returns a function that waits until there is something to read without
// taking anything; nil where that cannot be told.
func waiterOf(c any) func() error {
	if w, ok := c.(interface{ Waiter() func() error }); ok {
		return w.Waiter()
	}
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	var failed error
	readable := func(fd uintptr) bool {
		var b [1]byte
		// Looking takes a pending error away: the read would find a proper end.
		_, _, failed = unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return !errors.Is(failed, unix.EAGAIN)
	}
	return func() error {
		if err := raw.Read(readable); err != nil {
			return err
		}
		if errors.Is(failed, unix.EINTR) {
			return nil
		}
		return failed
	}
}
