package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
)

// Layout of ext4's superblock, by the kernel's documentation (filesystems/ext4,
// "Super Block").
const (
	superOffset   = 1024
	superSize     = 1024
	superMagic    = 0xef53
	magicOffset   = 0x38
	superChecksum = 0x3fc
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CheckExt4 tells an image that MakeExt4 has made, and that machines may have written
// to, from garbage. It reads no more than the superblock.
func CheckExt4(image string) error {
	f, err := os.Open(image)
	if err != nil {
		return fmt.Errorf("check disk image: %w", err)
	}
	defer f.Close()
	super := make([]byte, superSize)
	if _, err := f.ReadAt(super, superOffset); err != nil {
		return fmt.Errorf("check disk image: %w", err)
	}
	if binary.LittleEndian.Uint16(super[magicOffset:]) != superMagic {
		return errors.New("check disk image: it has no superblock")
	}
	// The kernel's crc32c is not inverted at the end, as Go's is.
	if ^crc32.Checksum(super[:superChecksum], castagnoli) != binary.LittleEndian.Uint32(super[superChecksum:]) {
		return errors.New("check disk image: the checksum of its superblock is wrong")
	}
	return nil
}
