package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/wrenn/wrenn/internal/sandbox"
)

const (
	blockSize   = 4096
	inodeSize   = 256
	bytesPerIno = 8192 // of the grown disk: half of what mke2fs takes by default, for trees of many small files

	groupBytes = blockSize * blockSize * 8 // what one block of bits tells the use of

	// Images grow up to this many blocks (1 TiB) while they are mounted, without
	// moving anything: their tables of groups have room for it.
	growBlocks = 1 << 28

	// All images have the same: a machine sees no other disk than its own, and what
	// is made twice of the same tree is the same.
	imageUUID = "77656e6e-6469-736b-8000-000000000001"

	features = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super," +
		"large_file,huge_file,dir_nlink,extra_isize,metadata_csum,resize_inode"
)

// mkfsConfig is the configuration of mke2fs: that it has nothing of its own to say
// for any size of file system.
const mkfsConfig = "[fs_types]\n ext4 = {\n }\n floppy = {\n }\n small = {\n }\n big = {\n }\n huge = {\n }\n"

// MakeExt4 writes an ext4 image of what is below root: owners, modes, times, links
// and extended attributes as they are. It is sparse, has next to no free room, and
// can be grown while it is mounted. image is replaced if there is one, when the new
// one is whole. A full disk gives sandbox.ErrExhausted.
func MakeExt4(ctx context.Context, root, image string) error {
	if err := makeExt4(ctx, root, image); err != nil {
		return fmt.Errorf("make disk image of %s: %w", root, Full(err))
	}
	return nil
}

func makeExt4(ctx context.Context, root, image string) error {
	mkfs, err := findProgram("mkfs.ext4", "e2fsprogs")
	if err != nil {
		return err
	}
	size, inodes, err := measure(ctx, root)
	if err != nil {
		return err
	}
	out, err := os.CreateTemp(filepath.Dir(image), ".ext4-")
	if err != nil {
		return err
	}
	out.Close()
	defer os.Remove(out.Name())
	// How much a tree takes is not known before it is written: extents, large
	// directories and attributes have blocks of their own.
	for try := 0; ; try++ {
		err := format(ctx, mkfs, root, out.Name(), size, inodes)
		if err == nil {
			break
		}
		var small *tooSmallError
		if !errors.As(err, &small) || try == 3 {
			return err
		}
		size += size / 2
	}
	if err := syncFile(out.Name()); err != nil {
		return err
	}
	return os.Rename(out.Name(), image)
}

// journalMiB is the size of the journal for an image of size bytes: mke2fs wants the
// journal below half of the image, and the kernel 4 MiB of it.
func journalMiB(size int64) int64 { return max(4, min(16, size>>24)) }

// measure estimates from above how large a file system for root must be, and how
// many inodes it must have.
func measure(ctx context.Context, root string) (size, inodes int64, err error) {
	type inode struct{ dev, ino uint64 }
	linked := map[inode]bool{}
	var blocks int64
	err = filepath.WalkDir(root, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Nlink > 1 && !fi.IsDir() {
			id := inode{st.Dev, st.Ino}
			if linked[id] {
				return nil
			}
			linked[id] = true
		}
		inodes++
		if fi.Mode().IsRegular() || fi.IsDir() {
			blocks += (fi.Size() + blockSize - 1) / blockSize
		}
		return nil
	})
	if err != nil {
		return 0, 0, err
	}
	inodes += inodes/20 + 64
	data := blocks*blockSize + blocks*blockSize/50
	// A grown file system has as many inodes in each of its groups of blocks as this
	// one; those that are not used take room in it and none on the host.
	groups := (data + data/10 + groupBytes - 1) / groupBytes
	inodes = max(inodes, groups*groupBytes/bytesPerIno)
	size = data + inodes*inodeSize + 8<<20
	size += journalMiB(size) << 20
	const mib = 1 << 20
	return (size + mib - 1) / mib * mib, inodes, nil
}

// tooSmallError: the image had not enough room for the tree.
type tooSmallError struct{ said string }

func (e *tooSmallError) Error() string { return "the image is too small: " + e.said }

func format(ctx context.Context, mkfs, root, image string, size, inodes int64) error {
	if err := os.Truncate(image, 0); err != nil {
		return err
	}
	if err := os.Truncate(image, size); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, mkfs, "-q", "-F",
		"-b", strconv.Itoa(blockSize), "-I", strconv.Itoa(inodeSize), "-N", strconv.FormatInt(inodes, 10),
		"-m", "0", "-J", "size="+strconv.FormatInt(journalMiB(size), 10), "-O", features, "-U", imageUUID,
		"-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,hash_seed="+imageUUID+",resize="+strconv.Itoa(growBlocks),
		"-d", root, image)
	// The host's defaults for new file systems are not ours.
	config := image + ".conf"
	if err := os.WriteFile(config, []byte(mkfsConfig), 0o600); err != nil {
		return err
	}
	defer os.Remove(config)
	cmd.Env = append(os.Environ(), "MKE2FS_CONFIG="+config, "SOURCE_DATE_EPOCH=1", "LC_ALL=C")
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	text := bytes.TrimSpace(said.Bytes())
	switch {
	case bytes.Contains(text, []byte("No space left on device")), bytes.Contains(text, []byte("Disk quota exceeded")):
		return sandbox.Errorf(sandbox.ErrExhausted, "the host's disk is full")
	case bytes.Contains(text, []byte("Could not allocate")), bytes.Contains(text, []byte("too small")):
		return &tooSmallError{string(text)}
	}
	return fmt.Errorf("mkfs.ext4: %w: %s", err, text)
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// findProgram finds a program that root's PATH may lack the directory of.
func findProgram(name, from string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is missing: apt-get install %s", name, from)
}
