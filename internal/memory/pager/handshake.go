package pager

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/process"
)

// region is where a part of the memory is in the monitor. JSON is Firecracker's.
type region struct {
	Base    uint64 `json:"base_host_virt_addr"`
	Size    uint64 `json:"size"`
	Offset  uint64 `json:"offset"` // in the memory
	Page    uint64 `json:"page_size"`
	PageOld uint64 `json:"page_size_kib"` // the same, in bytes despite its name
}

const (
	handshakeTime = 10 * time.Second
	maxHandshake  = 64 << 10
	maxRegions    = 256
	maxPieces     = 4 * maxRegions // that a monitor may cut them into
)

// monitor is the process that has connected, and what it has handed over.
type monitor struct {
	process *process.Handle
	fd      int // the userfaultfd; -1: none yet
	regions []region
	page    int64
}

func (m *monitor) close() {
	if m.fd >= 0 {
		unix.Close(m.fd)
	}
	m.process.Close()
}

// peer holds the process at the other end of a connection, if it is of this user
// or root.
func peer(conn *net.UnixConn, uid int) (*process.Handle, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var (
		cred *unix.Ucred
		cerr error
	)
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, err
	}
	if cerr != nil {
		return nil, cerr
	}
	if cred.Uid != 0 && int(cred.Uid) != uid {
		return nil, fmt.Errorf("user %d may not connect", cred.Uid)
	}
	id, err := process.Identify(int(cred.Pid))
	if err != nil {
		return nil, err
	}
	return id.Open()
}

// shake takes what a monitor sends: one message with its regions and a userfaultfd.
// Once the process is known it is in m, also with an error.
func (m *monitor) shake(conn *net.UnixConn, size int64) error {
	if err := conn.SetReadDeadline(time.Now().Add(handshakeTime)); err != nil {
		return err
	}
	buf, oob := make([]byte, maxHandshake), make([]byte, unix.CmsgSpace(4*4))
	n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return fmt.Errorf("the monitor hands over no memory: %w", err)
	}
	fds := descriptors(oob[:oobn])
	if len(fds) != 1 {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return fmt.Errorf("the monitor hands over %d descriptors, want one", len(fds))
	}
	m.fd = fds[0]
	if err = setup(m.fd); err != nil {
		return fmt.Errorf("the monitor's descriptor cannot be used: %w", err)
	}
	if err := json.Unmarshal(buf[:n], &m.regions); err != nil {
		return fmt.Errorf("the monitor's regions make no sense: %w", err)
	}
	m.page, err = checkRegions(m.regions, uint64(size))
	return err
}

func descriptors(oob []byte) []int {
	var fds []int
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, msg := range messages {
		if got, err := unix.ParseUnixRights(&msg); err == nil {
			fds = append(fds, got...)
		}
	}
	for _, fd := range fds {
		unix.CloseOnExec(fd)
	}
	return fds
}

// checkRegions says of which size the pages are.
func checkRegions(regions []region, size uint64) (int64, error) {
	if len(regions) == 0 || len(regions) > maxRegions {
		return 0, fmt.Errorf("the monitor has %d regions", len(regions))
	}
	page := regions[0].page()
	if page != 4<<10 && page != 2<<20 {
		return 0, fmt.Errorf("pages of %d bytes cannot be served: 4 KiB and 2 MiB can", page)
	}
	slices.SortFunc(regions, func(a, b region) int {
		if a.Offset < b.Offset {
			return -1
		}
		return 1
	})
	end := uint64(0)
	for _, r := range regions {
		if r.page() != page || r.Base%page != 0 || r.Size%page != 0 || r.Offset%page != 0 || r.Size == 0 || r.Base+r.Size < r.Base {
			return 0, errors.New("the monitor's regions are not of whole pages of one size")
		}
		if r.Offset < end || r.Size > size || r.Offset > size-r.Size {
			return 0, fmt.Errorf("a region of %d bytes at %d is not of a memory of %d bytes", r.Size, r.Offset, size)
		}
		end = r.Offset + r.Size
	}
	return int64(page), nil
}

func (r region) page() uint64 {
	switch {
	case r.Page != 0:
		return r.Page
	case r.PageOld != 0 && r.PageOld < 4096:
		return r.PageOld << 10
	case r.PageOld != 0:
		return r.PageOld
	}
	return 4 << 10
}
