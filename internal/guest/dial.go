package guest

import (
	"context"
	"net"
	"time"
)

// A SYN that meets a guest network just being brought up is lost, and the kernel would
// repeat it only after a second. So another connection is tried after a time that
// doubles, while those before may still come: a guest that is slow has answered one of
// them by then, and would have to begin again if that were given up.
const (
	dialAgain = 25 * time.Millisecond
	dialLimit = 3 * time.Second
)

// Dial connects to a guest that may be just coming up, for three seconds at most. The
// error is a *net.OpError.
func Dial(ctx context.Context, netw, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel() // ends the other attempts
	type outcome struct {
		conn net.Conn
		err  error
	}
	outcomes := make(chan outcome)
	d := net.Dialer{KeepAlive: 30 * time.Second}
	for wait := dialAgain; ; wait *= 2 {
		go func() {
			conn, err := d.DialContext(ctx, netw, addr)
			select {
			case outcomes <- outcome{conn, err}:
			case <-ctx.Done(): // another one was faster, or it is over
				if conn != nil {
					conn.Close()
				}
			}
		}()
		again := time.NewTimer(wait)
		select {
		case o := <-outcomes:
			again.Stop()
			return o.conn, o.err
		case <-ctx.Done():
			again.Stop()
			return nil, &net.OpError{Op: "dial", Net: netw, Err: ctx.Err()}
		case <-again.C:
		}
	}
}
