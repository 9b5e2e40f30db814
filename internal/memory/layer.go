package memory

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// A layer is its blocks, a checksum of each, and a footer.
const (
	layerMagic   = "WRENNLYR"
	layerVersion = 1
	footerSize   = 8 + 4 + 8 + 4 + 4 // magic, version, blocks, checksum of the checksums, checksum of the footer
)

// Layer is a file with blocks of memory, which never changes.
type Layer struct {
	ref     layerRef
	file    *os.File
	content io.ReaderAt // the file, or what it was before it was compressed

	checks *checks

	mapOnce sync.Once
	mapped  []byte // the blocks; nil where they cannot be mapped
}

// File is the layer's file, open for reading, with the blocks at its start; nil of a
// layer that is compressed.
func (l *Layer) File() *os.File {
	if l.compressed() {
		return nil
	}
	return l.file
}

func (l *Layer) compressed() bool { return l.content != io.ReaderAt(l.file) }

// Size is how many bytes of the file are blocks.
func (l *Layer) Size() int64 { return int64(l.ref.blocks) * BlockSize }

func openLayer(path string, ref layerRef) (*Layer, error) {
	file, content, size, err := openPlain(path)
	if errors.Is(err, os.ErrNotExist) {
		file, content, size, err = openFrames(path)
	}
	if err != nil {
		return nil, err
	}
	l := &Layer{ref: ref, file: file, content: content, checks: &checks{}}
	if size != l.Size()+int64(ref.blocks)*4+footerSize {
		file.Close()
		return nil, damaged("layer %s has %d bytes", ref.fileName(), size)
	}
	return l, nil
}

func openPlain(path string) (file *os.File, content io.ReaderAt, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, 0, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, nil, 0, err
	}
	return f, f, info.Size(), nil
}

// IsLayer says of a name in an image's directory whether it is a layer's. Which
// layers there are, and of which size, the header says.
func IsLayer(name string) bool {
	return strings.HasPrefix(name, "memory-") && strings.HasSuffix(strings.TrimSuffix(name, compressedSuffix), ".layer")
}

// load gives the checksums, and reads them the first time.
func (l *Layer) load() ([]byte, error) {
	if sums := l.checks.sums.Load(); sums != nil {
		return *sums, nil
	}
	l.checks.loading.Lock()
	defer l.checks.loading.Unlock()
	if sums := l.checks.sums.Load(); sums != nil {
		return *sums, nil
	}
	sums, err := l.readSums()
	if err == nil {
		l.checks.sums.Store(&sums)
	}
	return sums, err
}

func (l *Layer) readSums() ([]byte, error) {
	b := make([]byte, int64(l.ref.blocks)*4+footerSize)
	if _, err := l.content.ReadAt(b, l.Size()); err != nil {
		return nil, fmt.Errorf("read checksums of layer: %w", err)
	}
	sums, footer := b[:len(b)-footerSize], b[len(b)-footerSize:]
	if string(footer) != string(layerFooter(l.ref.blocks, crc32.Checksum(sums, castagnoli))) {
		return nil, damaged("the checksums of layer %s are not those written", l.ref.fileName())
	}
	return sums, nil
}

// Check compares blocks, which were read from at on, with their checksums.
func (l *Layer) Check(p []byte, at int64) error {
	sums, err := l.load()
	if err != nil {
		return err
	}
	first, n := uint64(at/BlockSize), uint64(len(p)/BlockSize)
	for i := first; len(p) > 0; i, p = i+1, p[BlockSize:] {
		if crc32.Checksum(p[:BlockSize], castagnoli) != binary.LittleEndian.Uint32(sums[i*4:]) {
			return damaged("block %d of layer %s is not what was written", i, l.ref.fileName())
		}
	}
	l.checks.note(first, n)
	return nil
}

// bytes gives blocks from at on, checked: read into p, or the file's own where they were
// found good before. Those are for the kernel to read and not for us: where the disk
// fails, it gives an error.
func (l *Layer) bytes(p []byte, at int64) ([]byte, error) {
	const few = 32 << 10 // of these a copy takes less than to map what is around them
	if len(p) >= few && l.known(p, at) {
		if m := l.mapping(); m != nil {
			// The kernel copies faster what is mapped already.
			if b := m[at:][:len(p)]; unix.Madvise(b, unix.MADV_POPULATE_READ) == nil {
				return b, nil
			}
		}
	}
	return p, l.readOnce(p, at)
}

// readOnce is read, and checks nothing that was checked before.
func (l *Layer) readOnce(p []byte, at int64) error {
	if l.known(p, at) {
		return l.readUnchecked(p, at)
	}
	return l.read(p, at)
}

// known says whether as many bytes as p has, from at on, were found good before.
func (l *Layer) known(p []byte, at int64) bool {
	return l.checks.has(uint64(at/BlockSize), uint64(len(p)/BlockSize))
}

func (l *Layer) mapping() []byte {
	l.mapOnce.Do(func() {
		if l.compressed() || l.Size() == 0 {
			return
		}
		if m, err := unix.Mmap(int(l.file.Fd()), 0, int(l.Size()), unix.PROT_READ, unix.MAP_SHARED); err == nil {
			l.mapped = m
		}
	})
	return l.mapped
}

// footprint is what Footprint counts of a layer.
func (l *Layer) footprint() int64 {
	const open = 1 << 10 // the structures of a file
	if !l.compressed() {
		return open
	}
	return open + framesFootprint(l.Size())
}

func (l *Layer) close() {
	l.file.Close()
	if l.mapped != nil {
		_ = unix.Munmap(l.mapped) // fails for no reason that is in our hands
	}
}

func (l *Layer) read(p []byte, at int64) error {
	if err := l.readUnchecked(p, at); err != nil {
		return err
	}
	return l.Check(p, at)
}

func (l *Layer) readUnchecked(p []byte, at int64) error {
	if _, err := l.content.ReadAt(p, at); err != nil {
		if errors.Is(err, io.EOF) {
			return damaged("layer %s has become shorter", l.ref.fileName())
		}
		return fmt.Errorf("read layer: %w", err)
	}
	return nil
}

func (l *Layer) cached(at int64) bool {
	if l.compressed() {
		return false
	}
	var b [1]byte
	n, err := unix.Preadv2(int(l.file.Fd()), [][]byte{b[:]}, at, unix.RWF_NOWAIT)
	return err == nil && n == 1
}

func layerFooter(blocks uint64, sum uint32) []byte {
	b := make([]byte, 0, footerSize)
	b = append(b, layerMagic...)
	b = binary.LittleEndian.AppendUint32(b, layerVersion)
	b = binary.LittleEndian.AppendUint64(b, blocks)
	b = binary.LittleEndian.AppendUint32(b, sum)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// layerWriter writes a new layer. It has no name until it is finished.
type layerWriter struct {
	ref  layerRef
	file *os.File
	sums []byte
}

func newLayer(dir string) (*layerWriter, error) {
	f, err := os.CreateTemp(dir, tempPrefix)
	if err != nil {
		return nil, err
	}
	w := &layerWriter{file: f}
	_, _ = rand.Read(w.ref.id[:]) // never fails
	return w, nil
}

// append adds whole blocks and gives the place of the first.
func (w *layerWriter) append(p []byte) (at uint32, err error) {
	if len(p) == 0 {
		return uint32(w.ref.blocks), nil
	}
	first := w.ref.blocks
	if first+uint64(len(p)/BlockSize) >= maxBlocks {
		return 0, errors.New("the layer is too large")
	}
	off := int64(first) * BlockSize
	if _, err := w.file.WriteAt(p, off); err != nil {
		return 0, err
	}
	// The disk works while the next blocks are read, and the sync at the end has
	// little left to do.
	_ = unix.SyncFileRange(int(w.file.Fd()), off, int64(len(p)), unix.SYNC_FILE_RANGE_WRITE)
	for ; len(p) > 0; p = p[BlockSize:] {
		w.sums = binary.LittleEndian.AppendUint32(w.sums, crc32.Checksum(p[:BlockSize], castagnoli))
		w.ref.blocks++
	}
	return uint32(first), nil
}

// end writes what comes after the blocks.
func (w *layerWriter) end() error {
	tail := append(w.sums, layerFooter(w.ref.blocks, crc32.Checksum(w.sums, castagnoli))...)
	_, err := w.file.WriteAt(tail, int64(w.ref.blocks)*BlockSize)
	return err
}

// name gives the layer its name. It is on the disk by then.
func (w *layerWriter) name(dir string) error {
	return os.Rename(w.file.Name(), filepath.Join(dir, w.ref.fileName()))
}

// discard closes the file, and removes it unless it was finished.
func (w *layerWriter) discard() {
	w.file.Close()
	os.Remove(w.file.Name())
}
