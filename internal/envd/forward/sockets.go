package forward

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// sockets tells which TCP sockets of the system listen. It may be asked by
// several at once.
type sockets interface {
	// listeners are in order, and listed as often as there are sockets. seen is
	// how many sockets were looked at to find them.
	listeners() (ls []listener, seen int, err error)
	// costly says that it should not be asked many times a second for ever.
	costly() bool
	close()
}

// openSockets finds the cheapest way there is. Linux lists the listening sockets
// alone; gVisor shows all TCP sockets in a file.
func openSockets() (sockets, error) {
	d, err := openDiag()
	if err == nil {
		return d, nil
	}
	f, errFiles := openProcNet("/proc/net")
	if errFiles != nil {
		return nil, fmt.Errorf("list listening sockets: %w", errors.Join(err, errFiles))
	}
	return f, nil
}

func sorted(ls []listener) []listener {
	slices.SortFunc(ls, compareListeners)
	return ls
}

// Childless says whether this process has no children. When it is pid 1, that
// is: nothing but it runs.
func Childless() bool {
	err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	return errors.Is(err, unix.ECHILD)
}
