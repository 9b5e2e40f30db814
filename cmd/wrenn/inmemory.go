package main

import (
	"context"
	"net"
	"sync"
)

// inMemoryListener is where control plane and host agent meet when they share a
// process: the same client and server as between two hosts, without a socket.
type inMemoryListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newInMemoryListener() *inMemoryListener {
	return &inMemoryListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

// DialContext connects to the listener, whatever the address.
func (l *inMemoryListener) DialContext(ctx context.Context, _, _ string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept implements net.Listener.
func (l *inMemoryListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *inMemoryListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr implements net.Listener.
func (l *inMemoryListener) Addr() net.Addr { return inMemoryAddr{} }

type inMemoryAddr struct{}

func (inMemoryAddr) Network() string { return "memory" }
func (inMemoryAddr) String() string  { return "host-agent" }
