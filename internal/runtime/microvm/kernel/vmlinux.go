package kernel

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"regexp"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// maxVmlinux bounds what a kernel may unpack to.
const maxVmlinux = 512 << 20

// uncompress returns the ELF kernel that is packed in a bzImage, or image itself
// when it is one.
func uncompress(ctx context.Context, image []byte) ([]byte, error) {
	if bytes.HasPrefix(image, []byte(elf.ELFMAG)) {
		return image, nil
	}
	payload, err := payloadOf(image)
	if err != nil {
		return nil, err
	}
	vmlinux, err := unpack(ctx, payload)
	if err != nil {
		return nil, fmt.Errorf("unpack kernel: %w", err)
	}
	if !bytes.HasPrefix(vmlinux, []byte(elf.ELFMAG)) {
		return nil, sandbox.Errorf(sandbox.ErrInvalid, "the kernel image does not hold an ELF kernel")
	}
	return vmlinux, nil
}

// payloadOf finds the compressed kernel in a bzImage by its header, which the
// kernel's documentation describes as the x86 boot protocol.
func payloadOf(image []byte) ([]byte, error) {
	const headerEnd = 0x250
	if len(image) < headerEnd || string(image[0x202:0x206]) != "HdrS" {
		return nil, sandbox.Errorf(sandbox.ErrInvalid, "the file is neither an ELF kernel nor an x86 kernel image")
	}
	if version := binary.LittleEndian.Uint16(image[0x206:]); version < 0x208 {
		return nil, sandbox.Errorf(sandbox.ErrInvalid, "the kernel image has boot protocol %#x, and 2.08 is needed", version)
	}
	sectors := int(image[0x1f1])
	if sectors == 0 {
		sectors = 4
	}
	start := uint64(sectors+1)*512 + uint64(binary.LittleEndian.Uint32(image[0x248:]))
	length := uint64(binary.LittleEndian.Uint32(image[0x24c:]))
	if length < 8 || start+length > uint64(len(image)) {
		return nil, sandbox.Errorf(sandbox.ErrInvalid, "the kernel image is cut short")
	}
	return image[start : start+length], nil
}

// unpack uncompresses a kernel's payload. Its last four bytes are the size of what
// comes out; formats that have it themselves may lack them.
func unpack(ctx context.Context, payload []byte) ([]byte, error) {
	body := payload[:len(payload)-4]
	switch {
	case bytes.HasPrefix(payload, []byte{0x02, 0x21, 0x4c, 0x18}):
		return unpackLZ4(body[4:])
	case bytes.HasPrefix(payload, []byte{0x1f, 0x8b}):
		r, err := gzip.NewReader(bytes.NewReader(payload))
		if err != nil {
			return nil, err
		}
		r.Multistream(false)
		return readAll(r)
	case bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		r, err := zstd.NewReader(bytes.NewReader(body))
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return readAll(r)
	case bytes.HasPrefix(payload, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return unpackXZ(ctx, body)
	}
	return nil, sandbox.Errorf(sandbox.ErrInvalid, "the kernel is packed in a way that is not known: give the unpacked vmlinux")
}

func readAll(r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxVmlinux+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxVmlinux {
		return nil, fmt.Errorf("it is larger than %d MiB", maxVmlinux>>20)
	}
	return data, nil
}

// unpackLZ4 reads the old frame format of lz4 that kernels use: blocks of 8 MiB
// with their packed size before them.
func unpackLZ4(packed []byte) ([]byte, error) {
	const blockSize = 8 << 20
	var out []byte
	block := make([]byte, blockSize)
	for len(packed) >= 4 {
		size := binary.LittleEndian.Uint32(packed)
		packed = packed[4:]
		if uint64(size) > uint64(len(packed)) || len(out) > maxVmlinux {
			return nil, errors.New("a block is damaged")
		}
		n, err := lz4.UncompressBlock(packed[:size], block)
		if err != nil {
			return nil, err
		}
		out = append(out, block[:n]...)
		packed = packed[size:]
	}
	return out, nil
}

// unpackXZ lets xz do it: kernels are packed with a filter for x86 code.
func unpackXZ(ctx context.Context, packed []byte) ([]byte, error) {
	xz, err := exec.LookPath("xz")
	if err != nil {
		return nil, errors.New("xz is missing: apt-get install xz-utils")
	}
	cmd := exec.CommandContext(ctx, xz, "-dc")
	cmd.Stdin = bytes.NewReader(packed)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("xz: %w: %s", err, bytes.TrimSpace(said.Bytes()))
	}
	return out.Bytes(), nil
}

var releasePattern = regexp.MustCompile(`Linux version ([0-9][0-9A-Za-z.+_~-]*) `)

// releaseOf finds in an ELF kernel what uname -r will say.
func releaseOf(vmlinux []byte) (string, error) {
	m := releasePattern.FindSubmatch(vmlinux)
	if m == nil {
		return "", sandbox.Errorf(sandbox.ErrInvalid, "the file is no Linux kernel: it does not say its version")
	}
	return string(m[1]), nil
}

// hasPVH says whether an ELF kernel can be started by its PVH entry, which it
// announces in a note of Xen's.
func hasPVH(vmlinux []byte) (bool, error) {
	const physicalEntry = 18 // XEN_ELFNOTE_PHYS32_ENTRY
	f, err := elf.NewFile(bytes.NewReader(vmlinux))
	if err != nil {
		return false, sandbox.Errorf(sandbox.ErrInvalid, "the kernel is no ELF file: %v", err)
	}
	if f.Machine != elf.EM_X86_64 {
		return false, nil
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE {
			continue
		}
		notes, err := io.ReadAll(p.Open())
		if err != nil {
			return false, err
		}
		for len(notes) >= 12 {
			nameLen := uint64(f.ByteOrder.Uint32(notes))
			descLen := uint64(f.ByteOrder.Uint32(notes[4:]))
			kind := f.ByteOrder.Uint32(notes[8:])
			next := 12 + (nameLen+3)&^3 + (descLen+3)&^3
			if next > uint64(len(notes)) {
				break
			}
			if kind == physicalEntry && string(notes[12:12+nameLen]) == "Xen\x00" {
				return true, nil
			}
			notes = notes[next:]
		}
	}
	return false, nil
}
