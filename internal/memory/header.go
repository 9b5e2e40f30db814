package memory

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
)

const (
	headerMagic   = "WRENNMEM"
	headerVersion = 1
	headerFixed   = 8 + 4 + 4 + 8 + 4 + 4 // magic, version, block size, size, layers, runs
	layerRefSize  = 16 + 8                // id, blocks
	maxLayers     = 1 << 16
	maxBlocks     = 1 << 32 // 16 TiB
)

// zero is the layer of blocks that are zero.
const zero = -1

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header is what an image consists of.
type header struct {
	blocks uint64
	layers []layerRef
	runs   []run // in order, without a gap
}

// layerRef names a layer beyond doubt.
type layerRef struct {
	id     [16]byte
	blocks uint64
}

func (l layerRef) fileName() string { return "memory-" + hex.EncodeToString(l.id[:]) + ".layer" }

// run is a range of blocks, all of one layer and in its order.
type run struct {
	start, n uint32 // n is never 0
	layer    int32  // index into the layers, or zero
	at       uint32 // block of the layer; 0 for zero
}

// end is one more than the last block, which may be one more than fits.
func (r run) end() uint64 { return uint64(r.start) + uint64(r.n) }

// from is what is left of a run from a block of it on.
func (r run) from(block uint32) run {
	skip := block - r.start
	r.start, r.n = block, r.n-skip
	if r.layer != zero {
		r.at += skip
	}
	return r
}

// upTo is a run cut off before a block.
func (r run) upTo(end uint64) run {
	r.n = uint32(min(r.end(), end) - uint64(r.start))
	return r
}

// joins says whether next goes on where r ends, in the image and in the layer.
func (r run) joins(next run) bool {
	return r.end() == uint64(next.start) && r.layer == next.layer && uint64(r.n)+uint64(next.n) < maxBlocks &&
		(r.layer == zero || uint64(r.at)+uint64(r.n) == uint64(next.at))
}

// appendRun adds a run, to the last one if it can.
func appendRun(runs []run, r run) []run {
	if r.n == 0 {
		return runs
	}
	if i := len(runs) - 1; i >= 0 && runs[i].joins(r) {
		runs[i].n += r.n
		return runs
	}
	return append(runs, r)
}

// overlay gives the runs of base with those of top in their places. base has no
// gap; top may have, and both are in order.
func overlay(base, top []run) []run {
	out := make([]run, 0, len(base)+2*len(top))
	i := 0
	at := uint64(0)
	upTo := func(end uint64) { // takes base from at to end
		for at < end {
			r := base[i].from(uint32(at)).upTo(end)
			out = appendRun(out, r)
			if at = r.end(); at == base[i].end() {
				i++
			}
		}
	}
	for _, r := range top {
		upTo(uint64(r.start))
		out = appendRun(out, r)
		for at = r.end(); i < len(base) && base[i].end() <= at; {
			i++
		}
	}
	if len(base) > 0 {
		upTo(base[len(base)-1].end())
	}
	return out
}

// prune takes out the layers that no run is in.
func (h *header) prune() {
	used := make([]bool, len(h.layers))
	for _, r := range h.runs {
		if r.layer != zero {
			used[r.layer] = true
		}
	}
	index := make([]int32, len(h.layers))
	var kept []layerRef
	for i, l := range h.layers {
		if used[i] {
			index[i] = int32(len(kept))
			kept = append(kept, l)
		}
	}
	h.layers = kept
	for i, r := range h.runs {
		if r.layer != zero {
			h.runs[i].layer = index[r.layer]
		}
	}
}

// encode gives the header's file. A run is its length, its layer plus one, and the
// distance from where the layer's last run ended, all as varints.
func (h *header) encode() []byte {
	b := make([]byte, 0, headerFixed+len(h.layers)*layerRefSize+len(h.runs)*4+4)
	b = append(b, headerMagic...)
	b = binary.LittleEndian.AppendUint32(b, headerVersion)
	b = binary.LittleEndian.AppendUint32(b, BlockSize)
	b = binary.LittleEndian.AppendUint64(b, h.blocks*BlockSize)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(h.layers)))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(h.runs)))
	for _, l := range h.layers {
		b = append(b, l.id[:]...)
		b = binary.LittleEndian.AppendUint64(b, l.blocks)
	}
	next := make([]int64, len(h.layers))
	for _, r := range h.runs {
		b = binary.AppendUvarint(b, uint64(r.n))
		b = binary.AppendUvarint(b, uint64(r.layer+1))
		if r.layer != zero {
			b = binary.AppendVarint(b, int64(r.at)-next[r.layer])
			next[r.layer] = int64(r.at) + int64(r.n)
		}
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))
}

// decodeHeader reads a header's file and believes nothing in it.
func decodeHeader(b []byte) (header, error) {
	var h header
	if len(b) < headerFixed+4 || string(b[:8]) != headerMagic {
		return h, damaged("the header is none")
	}
	body, sum := b[:len(b)-4], binary.LittleEndian.Uint32(b[len(b)-4:])
	if v := binary.LittleEndian.Uint32(b[8:]); v != headerVersion {
		return h, fmt.Errorf("memory image has version %d, and this program reads %d: use the version of wrenn that wrote it", v, headerVersion)
	}
	if crc32.Checksum(body, castagnoli) != sum {
		return h, damaged("the header's checksum is wrong")
	}
	return decodeBody(body)
}

func decodeBody(b []byte) (header, error) {
	var h header
	size := binary.LittleEndian.Uint64(b[16:])
	layers, runs := binary.LittleEndian.Uint32(b[24:]), binary.LittleEndian.Uint32(b[28:])
	h.blocks = size / BlockSize
	if binary.LittleEndian.Uint32(b[12:]) != BlockSize || size%BlockSize != 0 || h.blocks > maxBlocks-1 {
		return h, damaged("it has blocks or a size that cannot be")
	}
	b = b[headerFixed:]
	// The shortest run takes two bytes.
	if layers > maxLayers || uint64(len(b)) < uint64(layers)*layerRefSize || uint64(len(b)) < uint64(layers)*layerRefSize+uint64(runs)*2 {
		return h, damaged("the header is cut off")
	}
	for range layers {
		l := layerRef{blocks: binary.LittleEndian.Uint64(b[16:])}
		copy(l.id[:], b)
		if l.blocks >= maxBlocks {
			return h, damaged("a layer has a size that cannot be")
		}
		h.layers = append(h.layers, l)
		b = b[layerRefSize:]
	}
	h.runs = make([]run, 0, runs)
	d := runDecoder{layers: h.layers, next: make([]int64, layers), rest: b}
	for range runs {
		r, ok := d.decode()
		if !ok || r.end() > h.blocks {
			return h, damaged("run %d makes no sense", len(h.runs))
		}
		h.runs = append(h.runs, r)
	}
	if d.start != h.blocks || len(d.rest) != 0 {
		return h, damaged("the runs do not fill the memory")
	}
	return h, nil
}

type runDecoder struct {
	layers []layerRef
	next   []int64 // where the last run of each layer ended
	start  uint64
	rest   []byte
}

func (d *runDecoder) uvarint() (uint64, bool) {
	v, n := binary.Uvarint(d.rest)
	if n <= 0 {
		return 0, false
	}
	d.rest = d.rest[n:]
	return v, true
}

func (d *runDecoder) decode() (run, bool) {
	count, ok1 := d.uvarint()
	layer, ok2 := d.uvarint()
	if !ok1 || !ok2 || count == 0 || count >= maxBlocks || d.start >= maxBlocks || layer > uint64(len(d.layers)) {
		return run{}, false
	}
	r := run{start: uint32(d.start), n: uint32(count), layer: int32(layer) - 1}
	d.start += count
	if r.layer == zero {
		return r, true
	}
	delta, n := binary.Varint(d.rest)
	if n <= 0 {
		return run{}, false
	}
	d.rest = d.rest[n:]
	blocks := int64(d.layers[r.layer].blocks)
	at := d.next[r.layer] + delta
	if delta > maxBlocks || delta < -maxBlocks || at < 0 || at+int64(count) > blocks {
		return run{}, false
	}
	r.at = uint32(at)
	d.next[r.layer] = at + int64(count)
	return r, true
}
