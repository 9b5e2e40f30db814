package tunnel

import (
	"io"
	"sync"
)

// Stream is what a client joins with a tunnel: a TCP connection, or something else
// with two directions.
type Stream interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// Reset closes a stream in a way that its other end cannot take for a proper end,
// where it has one.
func Reset(s io.Closer) {
	if tcp, ok := s.(interface{ SetLinger(int) error }); ok {
		_ = tcp.SetLinger(0) // fails only on a closed connection
	}
	_ = s.Close() // an error means that it is closed already
}

// Join carries bytes between a stream and a tunnel until both directions have ended,
// and closes both. The error says why one of them broke: then the other one is
// broken as well, for what came on it is not all there was.
func Join(s Stream, t *Conn) error {
	defer t.Close()
	defer s.Close()
	var once sync.Once
	var failure error
	check := func(err error) {
		if err != nil {
			once.Do(func() {
				failure = err
				Reset(s)
				t.Abort()
			})
		}
	}
	var up sync.WaitGroup
	up.Go(func() {
		err := carry(t, s)
		if err == nil {
			err = t.CloseWrite()
		}
		check(err)
	})
	err := carry(s, t)
	if err == nil {
		_ = s.CloseWrite() // fails when whoever is there has gone, which reading tells
		err = t.AwaitClose()
	}
	check(err)
	up.Wait()
	return failure
}

// carry copies until from ends.
func carry(to io.Writer, from io.Reader) error {
	// Struct literals hide ReadFrom and WriteTo, so that the buffer's size counts.
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, maxFrame))
	return err
}
