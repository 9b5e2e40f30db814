package forward

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
)

// procNet lists sockets from the files tcp and tcp6 of a directory, which stay
// open: they are made anew when read from the start.
type procNet struct {
	mu    sync.Mutex
	files []*os.File
	buf   []byte
}

func openProcNet(dir string) (*procNet, error) {
	p := &procNet{buf: make([]byte, 8<<10)}
	for _, name := range []string{"tcp", "tcp6"} {
		file, err := os.Open(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) && name == "tcp6" {
			continue
		}
		if err != nil {
			p.close()
			return nil, fmt.Errorf("open socket table: %w", err)
		}
		p.files = append(p.files, file)
	}
	return p, nil
}

func (p *procNet) costly() bool { return true }

func (p *procNet) close() {
	for _, f := range p.files {
		f.Close()
	}
}

func (p *procNet) listeners() (ls []listener, seen int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.files {
		table, err := p.read(f)
		if err != nil {
			return nil, 0, fmt.Errorf("read socket table: %w", err)
		}
		seen += bytes.Count(table, []byte{'\n'})
		ls = parseTable(ls, table)
	}
	return sorted(ls), seen, nil
}

// read reads a file whole, in one go if its buffer is large enough: a table that
// is read in parts is made anew for some of them.
func (p *procNet) read(f *os.File) ([]byte, error) {
	for {
		n, err := f.ReadAt(p.buf, 0)
		if errors.Is(err, io.EOF) {
			return p.buf[:n], nil
		}
		if err != nil {
			return nil, err
		}
		p.buf = make([]byte, 2*len(p.buf))
	}
}

// parseTable appends what a table like /proc/net/tcp says to be listening. The
// kernel has each address as 32-bit words in its own byte order. Lines that are
// no sockets are skipped.
func parseTable(ls []listener, table []byte) []listener {
	for line := range bytes.Lines(table) {
		// "0: 0100007F:1F90 00000000:0000 0A …": number, local and remote end, state
		var fields [4][]byte
		n := 0
		for field := range bytes.FieldsSeq(line) {
			if n == len(fields) {
				break
			}
			fields[n] = field
			n++
		}
		if n < len(fields) || !bytes.Equal(fields[3], []byte("0A")) {
			continue
		}
		if addr, ok := parseEnd(fields[1]); ok {
			ls = append(ls, listener{addr: addr})
		}
	}
	return ls
}

func parseEnd(field []byte) (netip.AddrPort, bool) {
	host, port, ok := bytes.Cut(field, []byte{':'})
	if !ok || len(port) != 4 || (len(host) != 8 && len(host) != 32) {
		return netip.AddrPort{}, false
	}
	var raw [16]byte
	n, err := hex.Decode(raw[:], host)
	if err != nil {
		return netip.AddrPort{}, false
	}
	number, err := strconv.ParseUint(string(port), 16, 16)
	if err != nil || number == 0 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < n; i += 4 {
		word := binary.BigEndian.Uint32(raw[i:])
		binary.NativeEndian.PutUint32(raw[i:], word)
	}
	addr, _ := netip.AddrFromSlice(raw[:n])
	return netip.AddrPortFrom(addr.Unmap(), uint16(number)), true
}
