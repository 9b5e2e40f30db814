package bench

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
)

// httpLoad asks for one file again and again over some connections. The client is
// written out by hand and does as little as it can: its share of the machine is
// everybody's loss.
type httpLoad struct {
	address, host string
	body          proxyBody
	conns         int
	length        time.Duration
}

// run returns how long each request took, in ms.
func (l httpLoad) run(ctx context.Context) (samples, error) {
	conns := make([]net.Conn, l.conns)
	for i := range conns {
		c, err := new(net.Dialer).DialContext(ctx, "tcp", l.address)
		if err != nil {
			return nil, err
		}
		defer c.Close()
		conns[i] = c
	}
	taken := make([]samples, l.conns)
	var g errgroup.Group
	end := time.Now().Add(l.length)
	for i, c := range conns {
		if err := c.SetDeadline(end.Add(10 * time.Second)); err != nil {
			return nil, err
		}
		g.Go(func() (err error) {
			taken[i], err = l.client(ctx, c, end)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var all samples
	for _, t := range taken {
		all = append(all, t...)
	}
	return all, ctx.Err()
}

// client is one connection's requests.
func (l httpLoad) client(ctx context.Context, c net.Conn, end time.Time) (samples, error) {
	request := fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: wrenn-bench\r\nAccept: */*\r\n\r\n", l.body.path, l.host)
	buf := make([]byte, 256<<10)
	r := bufio.NewReaderSize(c, 4<<10)
	var took samples
	for now := time.Now(); now.Before(end) && ctx.Err() == nil; {
		if _, err := c.Write(request); err != nil {
			return nil, err
		}
		n, err := readHead(r)
		if err != nil {
			return nil, err
		}
		if n != l.body.size {
			return nil, fmt.Errorf("answer has %d bytes, want %d", n, l.body.size)
		}
		for n > 0 {
			got, err := r.Read(buf[:min(n, int64(len(buf)))])
			if err != nil {
				return nil, err
			}
			n -= int64(got)
		}
		done := time.Now()
		took.addMillis(done.Sub(now))
		now = done
	}
	return took, nil
}

var (
	status200     = []byte("HTTP/1.1 200 ")
	contentLength = []byte("content-length:")
)

// readHead reads the header of a good answer and returns its length.
func readHead(r *bufio.Reader) (int64, error) {
	length := int64(-1)
	for first := true; ; first = false {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return 0, err
		}
		switch {
		case first && !bytes.HasPrefix(line, status200):
			return 0, fmt.Errorf("answer is %q", line)
		case len(line) == 2 && length < 0:
			return 0, io.ErrUnexpectedEOF
		case len(line) == 2:
			return length, nil
		case len(line) > len(contentLength) && bytes.EqualFold(line[:len(contentLength)], contentLength):
			if length, err = strconv.ParseInt(string(bytes.TrimSpace(line[len(contentLength):])), 10, 64); err != nil {
				return 0, err
			}
		}
	}
}
