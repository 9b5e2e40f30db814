package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"syscall"
)

// Listen opens listeners on a TCP address:
//
//	"localhost:7080"  on 127.0.0.1 and, where there is IPv6, on ::1 as well:
//	                  resolvers differ in which of the two they name first
//	":7080"           on all addresses of both families
//	"10.0.0.5:7080"   on that address
//
// Port 0 means a free port, the same one on all.
func Listen(addr string) ([]net.Listener, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", addr, err)
	}
	if host != "localhost" {
		l, err := listenTCP(addr)
		if err != nil {
			return nil, fmt.Errorf("listen on %q: %w", addr, err)
		}
		return []net.Listener{l}, nil
	}
	// A port that is free on one family may be taken on the other.
	const attempts = 20
	for attempt := 1; ; attempt++ {
		ls, err := listenLoopback(port)
		if err == nil {
			return ls, nil
		}
		if port != "0" || attempt == attempts || !errors.Is(err, syscall.EADDRINUSE) {
			return nil, fmt.Errorf("listen on %q: %w", addr, err)
		}
	}
}

func listenLoopback(port string) ([]net.Listener, error) {
	v4, err := listenTCP(net.JoinHostPort("127.0.0.1", port))
	if err != nil {
		return nil, err
	}
	same := strconv.Itoa(v4.Addr().(*net.TCPAddr).Port)
	v6, err := listenTCP(net.JoinHostPort("::1", same))
	if errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT) {
		return []net.Listener{v4}, nil // no IPv6 here
	}
	if err != nil {
		v4.Close()
		return nil, err
	}
	return []net.Listener{v4, v6}, nil
}

func listenTCP(addr string) (net.Listener, error) {
	var lc net.ListenConfig // with keep-alive, which finds clients that vanished
	return lc.Listen(context.Background(), "tcp", addr)
}
