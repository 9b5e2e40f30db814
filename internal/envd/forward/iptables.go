package forward

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The structures of the kernel's older interface for rules, with which iptables
// sets a table at once: struct ipt_replace followed by entries, each a struct
// ipt_entry with its matches and its target.
const (
	optTable     = 64 // to set: IPT_SO_SET_REPLACE, to get: IPT_SO_GET_INFO
	replaceSize  = 96
	infoSize     = 84
	entrySize    = 112
	tcpSize      = 32 + 16 // with a struct xt_entry_match, as are the ports
	portsSize    = 32 + 48
	redirectSize = 32 + 24 // with a struct xt_entry_target, as are these
	verdictSize  = 32 + 8
	errorSize    = 32 + 32

	matchPorts = 15 // of one entry
	// maxEntries that redirect keep a table below the 32 KiB that gVisor takes.
	maxEntries = 100
)

// natHooks are those of the table nat: packets that come in, for the machine,
// from the machine, and go out.
var natHooks = []int{0, 1, 3, 4}

// ipTables redirects by the table nat for IPv4. It is for gVisor, which has this
// interface only. Once the table has been another than the empty one gVisor
// follows every connection of the sandbox, so it stays empty as long as can be.
// A sandbox restored from memory begins with the empty table.
type ipTables struct {
	fd    int
	port  uint16
	now   map[netip.AddrPort]bool
	table natTable
}

// natTable is what the kernel is given, and what it tells of it.
type natTable struct {
	blob    []byte
	entries uint32
}

func newIPTables(port uint16) (rules, error) {
	// A raw socket is what the options are of. Of this protocol it gets no packets.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil, fmt.Errorf("open iptables: %w", err)
	}
	t := &ipTables{fd: fd, port: port, table: newTable(nil, port)}
	if !t.intact() {
		err = errors.New("there are rules, or no right to make some")
	} else {
		// What is there already. Linux, where the rules are not the agent's alone,
		// wants to be asked in another way and refuses.
		err = t.replace(t.table)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open iptables: %w", err)
	}
	return t, nil
}

func (t *ipTables) set(want map[netip.AddrPort]bool) error {
	want = maps.Clone(want)
	maps.DeleteFunc(want, func(at netip.AddrPort, _ bool) bool { return !at.Addr().Is4() })
	if maps.Equal(want, t.now) && t.intact() {
		return nil
	}
	next := newTable(slices.SortedFunc(maps.Keys(want), netip.AddrPort.Compare), t.port)
	if err := t.replace(next); err != nil {
		return fmt.Errorf("change redirection: %w", err)
	}
	t.now, t.table = want, next
	return nil
}

// intact compares sizes: nobody else in the sandbox may change the table.
func (t *ipTables) intact() bool {
	var info [infoSize]byte // struct ipt_getinfo
	copy(info[:], "nat")
	size := uint32(len(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(t.fd), unix.SOL_IP, optTable,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	return errno == 0 &&
		binary.NativeEndian.Uint32(info[76:]) == t.table.entries &&
		binary.NativeEndian.Uint32(info[80:]) == uint32(len(t.table.blob)-replaceSize)
}

func (t *ipTables) replace(with natTable) error {
	return unix.SetsockoptString(t.fd, unix.SOL_IP, optTable, string(with.blob))
}

func (t *ipTables) close() {
	_ = t.replace(newTable(nil, t.port)) // fails only if all has an end
	unix.Close(t.fd)
}

// newTable redirects connections to the addresses, which are in order, to a port.
// Of more than the table has room for, the last are left out.
func newTable(addrs []netip.AddrPort, port uint16) natTable {
	t := natTable{blob: make([]byte, replaceSize)}
	for len(addrs) > 0 && t.entries < maxEntries {
		n := 1
		for n < min(len(addrs), matchPorts) && addrs[n].Addr() == addrs[0].Addr() {
			n++
		}
		t.add(addrs[0].Addr(), matchSYN(), matchDestination(addrs[:n]), redirectTo(port))
		addrs = addrs[n:]
	}
	head := t.blob[:replaceSize]
	copy(head, "nat")
	for i, hook := range natHooks { // each ends with an entry that accepts
		end := uint32(len(t.blob) - replaceSize)
		start := end
		if i == 0 {
			start = 0
		}
		head = t.blob[:replaceSize]
		head[32] |= 1 << hook
		binary.NativeEndian.PutUint32(head[44+4*hook:], start)
		binary.NativeEndian.PutUint32(head[64+4*hook:], end)
		t.add(netip.Addr{}, acceptAll())
	}
	t.add(netip.Addr{}, errorTarget())
	head = t.blob[:replaceSize]
	binary.NativeEndian.PutUint32(head[36:], t.entries)
	binary.NativeEndian.PutUint32(head[40:], uint32(len(t.blob)-replaceSize))
	return t
}

// add appends an entry for TCP packets to an address, or for all if it is none.
// The last part is its target.
func (t *natTable) add(to netip.Addr, parts ...[]byte) {
	matches := parts[:len(parts)-1]
	entry := make([]byte, entrySize)
	if to.IsValid() {
		copy(entry[4:], to.AsSlice())
		copy(entry[12:], []byte{255, 255, 255, 255})
		binary.NativeEndian.PutUint16(entry[80:], unix.IPPROTO_TCP)
	}
	target := entrySize + len(bytes.Join(matches, nil))
	binary.NativeEndian.PutUint16(entry[88:], uint16(target))
	binary.NativeEndian.PutUint16(entry[90:], uint16(target+len(parts[len(parts)-1])))
	t.blob = append(append(t.blob, entry...), bytes.Join(parts, nil)...)
	t.entries++
}

// extension starts a match or a target: its size, name and revision.
func extension(name string, size int, revision byte) []byte {
	b := make([]byte, size)
	binary.NativeEndian.PutUint16(b, uint16(size))
	copy(b[2:31], name)
	b[31] = revision
	return b
}

// matchSYN matches the first packet of a connection. Others may be of one that
// is older than the rules.
func matchSYN() []byte {
	const fin, syn, rst, ack = 1, 2, 4, 16
	m := extension("tcp", tcpSize, 0)
	binary.NativeEndian.PutUint16(m[34:], 65535) // any source
	binary.NativeEndian.PutUint16(m[38:], 65535) // and destination
	m[41], m[42] = fin|syn|rst|ack, syn
	return m
}

// matchDestination matches the ports of the addresses.
func matchDestination(addrs []netip.AddrPort) []byte {
	const destination = 1
	m := extension("multiport", portsSize, 1)
	m[32], m[33] = destination, byte(len(addrs))
	for i, a := range addrs {
		binary.NativeEndian.PutUint16(m[34+2*i:], a.Port())
	}
	return m
}

func redirectTo(port uint16) []byte {
	t := extension("REDIRECT", redirectSize, 0)
	binary.NativeEndian.PutUint32(t[32:], 1) // one range
	binary.NativeEndian.PutUint32(t[36:], unix.NF_NAT_RANGE_PROTO_SPECIFIED)
	binary.BigEndian.PutUint16(t[48:], port)
	binary.BigEndian.PutUint16(t[50:], port)
	return t
}

func acceptAll() []byte {
	const accept = uint32(1) // a verdict is given as its complement
	t := extension("", verdictSize, 0)
	binary.NativeEndian.PutUint32(t[32:], ^accept)
	return t
}

// errorTarget ends a table.
func errorTarget() []byte {
	t := extension("ERROR", errorSize, 0)
	copy(t[32:], "ERROR")
	return t
}
