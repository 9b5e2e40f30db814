package forward

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// packets tells that TCP packets have come, from outside or within. It is how a
// forwarder that looks seldom learns that somebody asks for a port. Of the raw
// socket all that is used is that it becomes readable.
type packets struct {
	socket *os.File
}

func openPackets() (packets, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if err != nil {
		return packets{}, fmt.Errorf("watch packets: %w", err)
	}
	// The smallest buffer there is: what does not fit is dropped, at no cost.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil {
		unix.Close(fd)
		return packets{}, fmt.Errorf("watch packets: %w", err)
	}
	return packets{os.NewFile(uintptr(fd), "packets")}, nil
}

// watch calls notify when packets have come, at most once an interval, until ctx
// ends.
func (p packets) watch(ctx context.Context, notify func()) {
	defer p.socket.Close()
	stop := context.AfterFunc(ctx, func() { p.socket.Close() })
	defer stop()
	conn, err := p.socket.SyscallConn()
	for err == nil {
		err = conn.Read(drain)
		notify()
		if !wait(ctx, interval, nil) {
			return
		}
	}
}

// drain reads what there is; false says that it was nothing.
func drain(fd uintptr) bool {
	var none [1]byte
	for came := false; ; {
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
}
