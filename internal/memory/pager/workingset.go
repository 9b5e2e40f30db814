package pager

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"

	"github.com/wrenn/wrenn/internal/memory"
)

const (
	setMagic   = "WRENNWST"
	setVersion = 1
	setFixed   = 8 + 4 + 4 // magic, version, pages
	maxSet     = 1 << 22   // pages of a working set: 16 GiB
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// WriteWorkingSet writes blocks of an image, in the order in which they were first
// touched. The file is there whole or not at all.
func WriteWorkingSet(path string, blocks []uint32) error {
	b := make([]byte, 0, setFixed+4*len(blocks)+4)
	b = append(b, setMagic...)
	b = binary.LittleEndian.AppendUint32(b, setVersion)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(blocks)))
	for _, n := range blocks {
		b = binary.LittleEndian.AppendUint32(b, n)
	}
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	f, err := os.CreateTemp(filepath.Dir(path), ".working-set-")
	if err != nil {
		return fmt.Errorf("write working set: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write working set: %w", err)
	}
	return nil
}

// ReadWorkingSet reads what WriteWorkingSet wrote. A file that makes no sense
// gives memory.ErrDamaged; nothing depends on it but speed.
func ReadWorkingSet(path string) ([]uint32, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read working set: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read working set: %w", err)
	}
	if fi.Size() > setFixed+4*maxSet+4 || fi.Size() < setFixed+4 {
		return nil, fmt.Errorf("read working set: %w: it has %d bytes", memory.ErrDamaged, fi.Size())
	}
	b := make([]byte, fi.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, fmt.Errorf("read working set: %w", err)
	}
	body, sum := b[:len(b)-4], binary.LittleEndian.Uint32(b[len(b)-4:])
	n := binary.LittleEndian.Uint32(b[12:])
	if string(b[:8]) != setMagic || binary.LittleEndian.Uint32(b[8:]) != setVersion || len(body) != setFixed+4*int(n) || crc32.Checksum(body, castagnoli) != sum {
		return nil, fmt.Errorf("read working set: %w", memory.ErrDamaged)
	}
	blocks := make([]uint32, n)
	for i := range blocks {
		blocks[i] = binary.LittleEndian.Uint32(body[setFixed+4*i:])
	}
	return blocks, nil
}
