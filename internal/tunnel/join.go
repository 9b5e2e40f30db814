package tunnel

import (
	"io"
	"net"
	"sync"
)

// Join carries bytes between a connection and a tunnel until both directions have
// ended, and closes both. The error says why the tunnel broke, if it did: then the
// connection is reset, for what came on it is not all there was.
func Join(conn net.Conn, t *Conn) error {
	defer t.Close()
	defer conn.Close()
	var once sync.Once
	var failure error
	fail := func(err error) {
		once.Do(func() {
			failure = err
			if tcp, ok := conn.(interface{ SetLinger(int) error }); ok {
				_ = tcp.SetLinger(0) // fails only on a closed connection
			}
			_ = conn.Close()
			t.Abort()
		})
	}
	var up sync.WaitGroup
	up.Go(func() {
		err := carry(t, conn)
		if err == nil {
			err = t.CloseWrite()
		}
		if err != nil {
			fail(err)
		}
	})
	err := carry(conn, t)
	if err == nil {
		if half, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite() // fails when whoever is there has gone, which reading tells
		}
		err = t.AwaitClose()
	}
	if err != nil {
		fail(err)
	}
	up.Wait()
	return failure
}

// carry copies until from ends.
func carry(to io.Writer, from io.Reader) error {
	// Struct literals hide ReadFrom and WriteTo, so that the buffer's size counts.
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, maxFrame))
	return err
}
