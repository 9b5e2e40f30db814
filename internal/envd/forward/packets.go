package forward

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// watchPackets calls notify when TCP packets have come, from outside or within,
// at most once an interval, until ctx ends. It is how a forwarder that looks
// seldom learns that somebody asks for a port: of a raw socket all that is used
// is that it becomes readable.
func watchPackets(ctx context.Context, notify func()) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if err != nil {
		return fmt.Errorf("watch packets: %w", err)
	}
	socket := os.NewFile(uintptr(fd), "packets")
	defer socket.Close()
	// The smallest buffer there is: what does not fit is dropped, at no cost.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil {
		return fmt.Errorf("watch packets: %w", err)
	}
	conn, err := socket.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch packets: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { socket.Close() })
	defer stop()
	var none [1]byte
	for {
		err := conn.Read(func(fd uintptr) bool {
			came := false
			for {
				_, _, err := unix.Recvfrom(int(fd), none[:], 0)
				switch {
				case err == nil:
					came = true
				case errors.Is(err, unix.EAGAIN):
					return came
				case !errors.Is(err, unix.EINTR):
					return true
				}
			}
		})
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("watch packets: %w", err)
		}
		notify()
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			return nil
		}
	}
}
