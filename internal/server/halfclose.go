package server

import (
	"context"
	"net"
	"net/http"

	"github.com/wrenn/wrenn/internal/hangup"
)

// lastRequest returns a request, that its client has said is its last one, as one
// that goes on after the client has ended its direction: it waits for the answer
// still (RFC 9112, 9.6). net/http takes that end for a client that has gone. One
// that really has is noticed when its kernel resets the connection, which it does at
// the first byte of an answer at the latest.
//
// What is returned with it must be called when the request has been answered.
func lastRequest(r *http.Request, conn net.Conn) (*http.Request, func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	stop := context.AfterFunc(r.Context(), func() {
		_ = hangup.Await(conn) // whatever ends it, nobody is there any more
		cancel()
	})
	return r.WithContext(ctx), func() {
		stop()
		cancel()
	}
}

// halfClosable reports whether a client may end its direction before it has the
// answer. One that speaks another protocol afterwards has its connection looked
// after elsewhere.
func halfClosable(r *http.Request) bool {
	return r.ProtoMajor == 1 && r.Close && r.Method != http.MethodConnect && r.Header["Upgrade"] == nil
}
