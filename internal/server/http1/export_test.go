package http1

import (
	"context"
	"net"
	"net/http"
)

// Parse is what a connection makes of what a client has sent.
func Parse(buf []byte) (*http.Request, int) {
	client, server := net.Pipe()
	client.Close()
	defer server.Close()
	c := &conn{raw: server, rw: server, buf: buf, ctx: context.Background()}
	r, end, verdict := c.parse()
	if verdict != headGood {
		return nil, 0
	}
	return r, end
}
