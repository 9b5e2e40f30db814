package process

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// openTerminal makes a pseudo-terminal that belongs to the user. The master does
// not block, so that reads and writes can be interrupted and hold no thread.
func openTerminal(uid uint32, size Size) (master *os.File, slave int, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("open /dev/ptmx: %w", err)
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	defer func() {
		if err != nil {
			master.Close()
		}
	}()
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, 0, fmt.Errorf("unlock terminal: %w", err)
	}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, 0, fmt.Errorf("get terminal number: %w", err)
	}
	if err := resizeFD(fd, size); err != nil {
		return nil, 0, err
	}
	name := "/dev/pts/" + strconv.Itoa(number)
	slave, err = unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("open %s: %w", name, err)
	}
	// Programs such as sudo open their terminal by name. The group stays what
	// devpts gave it (tty). Not every sandbox kernel can do this.
	_ = unix.Fchown(slave, int(uid), -1)
	return master, slave, nil
}

// resize changes the size of the terminal; its foreground processes get SIGWINCH.
func resize(master *os.File, size Size) error {
	conn, err := master.SyscallConn()
	if err != nil {
		return err
	}
	var failure error
	if err := conn.Control(func(fd uintptr) { failure = resizeFD(int(fd), size) }); err != nil {
		return err
	}
	return failure
}

func resizeFD(fd int, size Size) error {
	const most = 1<<16 - 1
	err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{
		Col: uint16(min(size.Cols, most)),
		Row: uint16(min(size.Rows, most)),
	})
	if err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	return nil
}
