package qemu

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/runtime/microvm"
)

// listen makes the socket that QEMU is controlled at. QEMU gets it as it is, so that
// nobody has to wait for it to be there.
func listen(m microvm.Machine) (*os.File, error) {
	fd, err := unix.Open(m.Run(), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make control socket: %w", err)
	}
	at := os.NewFile(uintptr(fd), m.Run())
	defer at.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", at.Fd(), socketName)})
	if err != nil {
		return nil, fmt.Errorf("make control socket: %w", err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	return l.File()
}

// openTAP opens the slot's link for the machine. The thread is in the slot's network
// namespace.
func openTAP(name string) (*os.File, error) {
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open tap: %w", err)
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(int(f.Fd()), unix.TUNSETIFF, req); err != nil {
		return nil, errors.Join(fmt.Errorf("open tap %s: %w", name, err), f.Close())
	}
	return f, nil
}
