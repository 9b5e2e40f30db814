package proxy

import (
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
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
	client, early, err := s.switchProtocols()
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
	splice(client, c.Conn, s, &s.proxy.buffers)
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

// splice carries bytes both ways until both directions have ended or one has
// failed. The end of one direction is passed on as such: some protocols go on
// talking in the other.
func splice(client, guest net.Conn, s *stream, buffers *bufferPool) {
	var up sync.WaitGroup
	up.Go(func() {
		if err := pump(guest, client, &s.received, buffers); err != nil {
			// Whoever is broken, the other one learns of it.
			closeBoth(client, guest)
		}
	})
	if err := pump(client, guest, &s.sent, buffers); err != nil {
		closeBoth(client, guest)
	}
	up.Wait()
}

func closeBoth(a, b net.Conn) {
	_ = a.Close() // errors mean that they were closed already
	_ = b.Close()
}

// pump copies until the source ends, which it passes on as half a close.
func pump(to, from net.Conn, count *tally, buffers *bufferPool) error {
	wait := waiterOf(from)
	var small []byte
	if wait == nil {
		small = make([]byte, 4*idleBuffer) // a record of TLS
	}
	for {
		if wait != nil {
			// An idle connection holds no buffer: there may be ten thousands.
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
func closeWrite(c net.Conn) error {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errHalfClose
}

var errHalfClose = errors.New("the connection cannot be closed in one direction only")

// waiterOf returns a function that waits until a socket can be read without taking
// anything from it; nil where that cannot be told.
func waiterOf(c net.Conn) func() error {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	readable := func(fd uintptr) bool {
		var b [1]byte
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return !errors.Is(err, unix.EAGAIN)
	}
	return func() error { return raw.Read(readable) }
}
