package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/tunnel"
)

// tunnelPing keeps idle tunnels alive on the way.
const tunnelPing = 30 * time.Second

// Dial connects to a TCP port of the sandbox, through a tunnel. The context is that
// of opening it. The error is a GoneError when nobody listens there or the sandbox
// has ended, and else mostly an APIError.
func (s *Sandbox) Dial(ctx context.Context, port uint16) (*tunnel.Conn, error) {
	op := fmt.Sprintf("open a tunnel to port %d", port)
	base := s.baseURL
	if s.named {
		// The host alone says which port is meant.
		base = strings.Replace(base, strconv.Itoa(envdPort)+"-", strconv.Itoa(int(port))+"-", 1)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/", nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	req.Header.Set(headerSandboxID, s.id)
	req.Header.Set(headerSandboxPort, strconv.Itoa(int(port)))
	req.Header.Set("User-Agent", "wrenn-cli")
	if s.trafficToken != "" {
		req.Header.Set(headerTrafficToken, s.trafficToken)
	}
	key := tunnel.Ask(req.Header)
	res, err := s.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	conn, ok := res.Body.(io.ReadWriteCloser)
	if res.StatusCode >= http.StatusBadRequest || !ok {
		defer res.Body.Close()
		return nil, readError(op, res)
	}
	if err := tunnel.Check(res, key); err != nil {
		res.Body.Close()
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	t := tunnel.New(conn, tunnel.Config{Client: true})
	t.KeepAlive(tunnelPing)
	return t, nil
}
