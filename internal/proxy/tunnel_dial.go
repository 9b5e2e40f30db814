package proxy

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
)

// dialTunnel connects to the sandbox's port, through its host agent's proxy where
// the sandbox is on another host. It also returns what has come from the port
// already.
func (p *Proxy) dialTunnel(s *stream) (*guestConn, []byte, error) {
	conn, err := p.dialGuest(s.ctx, s.guest, s.hop)
	if err != nil || s.hopPrefix == "" {
		return conn, nil, err
	}
	c := newUpstream(conn, s.hop)
	watch := context.AfterFunc(s.ctx, c.interrupt)
	err = c.askForTunnel(s.dest)
	if !watch() && err == nil {
		err = context.Canceled
	}
	if err != nil {
		c.close()
		return nil, nil, err
	}
	return conn, c.releaseBuffers(), nil
}

func (c *upstream) askForTunnel(d Destination) error {
	target := fmt.Sprintf("%d-%s:%d", d.Port, d.SandboxID, d.Port)
	fmt.Fprintf(c.bw, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, target)
	if err := c.bw.Flush(); err != nil {
		return err
	}
	c.budget = maxResponseHeader
	res, err := http.ReadResponse(c.br, &http.Request{Method: http.MethodConnect})
	c.budget = -1
	if err != nil {
		return err
	}
	if res.StatusCode == http.StatusOK {
		return nil
	}
	defer res.Body.Close()
	refused := &refusal{}
	const largest = 64 << 10
	if json.NewDecoder(io.LimitReader(res.Body, largest)).Decode(&refused.failure) != nil || refused.failure.Code != res.StatusCode {
		return fmt.Errorf("the host agent answers %q in place of a tunnel", res.Status)
	}
	return refused
}

// refusal is what a host agent's proxy says in place of a tunnel.
type refusal struct{ failure failure }

func (r *refusal) Error() string { return r.failure.Message }
