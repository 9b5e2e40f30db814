package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/sandbox"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts file systems")
	}
}

// Loop devices have sectors of 4096 bytes here.
var mkfsFlags = map[string][]string{"xfs": {"-s", "size=4096"}, "ext4": {"-b", "4096"}}

// mountNew makes a file system of that kind on a loop device and returns where it
// is mounted.
func mountNew(t *testing.T, kind string, size int64) string {
	t.Helper()
	needRoot(t)
	mkfs, err := findProgram("mkfs."+kind, "it")
	if err != nil {
		t.Skip(err)
	}
	image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, size)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, append(mkfsFlags[kind], "-q", image)...).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.%s: %v: %s", kind, err, out)
	}
	loop, err := attach(image)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	if err := unix.Mount(loop.Name(), dir, kind, 0, ""); err != nil {
		t.Skipf("the kernel does not mount %s: %v", kind, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// onEveryFileSystem runs a test where files can share blocks and where they cannot.
func onEveryFileSystem(t *testing.T, test func(t *testing.T, dir string, reflinks bool)) {
	for kind, reflinks := range map[string]bool{"ext4": false, "xfs": true, "btrfs": true} {
		t.Run(kind, func(t *testing.T) { test(t, mountNew(t, kind, 512<<20), reflinks) })
	}
}

// writeSparse writes a file with data at some places and holes between.
func writeSparse(t *testing.T, path string, size int64, pieces int) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	piece := make([]byte, 100_000)
	for range pieces {
		for i := range piece {
			piece[i] = byte(rand.Int())
		}
		if _, err := f.WriteAt(piece, rand.Int63n(size-int64(len(piece)))); err != nil {
			t.Fatal(err)
		}
	}
}

// stored is how many bytes of a file take room, once they are written.
func stored(t *testing.T, path string) int64 {
	t.Helper()
	if err := syncFile(path); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func free(t *testing.T, dir string) int64 {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var st unix.Statfs_t
	if err := errors.Join(unix.Syncfs(int(d.Fd())), unix.Fstatfs(int(d.Fd()), &st)); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bavail) * st.Bsize
}

func sameContent(t *testing.T, a, b string) {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(x, y) {
		t.Errorf("%s and %s differ", a, b)
	}
}

func TestACloneIsTheSameAndSharesWhatItCan(t *testing.T) {
	onEveryFileSystem(t, func(t *testing.T, dir string, reflinks bool) {
		if got, err := HoldsReflinks(dir); err != nil || got != reflinks {
			t.Fatalf("HoldsReflinks: %v, %v; want %v", got, err, reflinks)
		}
		src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
		writeSparse(t, src, 150<<20+123, 300)
		if err := os.WriteFile(dst, []byte("was there before"), 0o600); err != nil {
			t.Fatal(err)
		}
		before := free(t, dir)
		start := time.Now()
		if err := Clone(t.Context(), src, dst); err != nil {
			t.Fatal(err)
		}
		t.Logf("took %v", time.Since(start).Round(10*time.Microsecond))
		sameContent(t, src, dst)
		if a, b := stored(t, src), stored(t, dst); b > a+a/20 {
			t.Errorf("the clone takes %d bytes, its source %d", b, a)
		}
		took, size := before-free(t, dir), stored(t, src)
		if reflinks && took > size/4 {
			t.Errorf("a clone of %d bytes took %d, want them shared", size, took)
		}
		// Neither sees what is written to the other.
		if err := os.WriteFile(filepath.Join(dir, "copy"), mustRead(t, src), 0o600); err != nil {
			t.Fatal(err)
		}
		writeInto(t, dst, "changed")
		sameContent(t, src, filepath.Join(dir, "copy"))
		onlyFiles(t, dir, "src", "dst", "copy", "lost+found")
	})
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func writeInto(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte(text), 0); err != nil {
		t.Fatal(err)
	}
}

// onlyFiles fails the test if there are other files in dir than these.
func onlyFiles(t *testing.T, dir string, names ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.Contains(" "+strings.Join(names, " ")+" ", " "+e.Name()+" ") {
			t.Errorf("%s was left in %s", e.Name(), dir)
		}
	}
}

func TestACloneOntoAnotherFileSystemIsSparse(t *testing.T) {
	from, to := mountNew(t, "xfs", 512<<20), mountNew(t, "ext4", 512<<20)
	src, dst := filepath.Join(from, "src"), filepath.Join(to, "dst")
	for size, pieces := range map[int64]int{4 << 30: 50, 200_000: 1} {
		writeSparse(t, src, size, pieces)
		if err := Clone(t.Context(), src, dst); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(dst)
		if err != nil || fi.Size() != size {
			t.Fatalf("size %v (%v), want %d", fi.Size(), err, size)
		}
		if got := stored(t, dst); got > int64(pieces)*120_000 {
			t.Errorf("the clone takes %d bytes for %d pieces of data", got, pieces)
		}
		if size < 1<<30 {
			sameContent(t, src, dst)
		}
	}
}

func TestACloneThatDoesNotFitOrIsNotWantedLeavesNothing(t *testing.T) {
	small, big := mountNew(t, "ext4", 16<<20), mountNew(t, "xfs", 512<<20)
	src := filepath.Join(big, "src")
	writeSparse(t, src, 64<<20, 600)
	if err := Clone(t.Context(), src, filepath.Join(small, "dst")); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("onto a disk that is too small: %v, want ErrExhausted", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Clone(ctx, src, filepath.Join(big, "dst")); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of its context: %v", err)
	}
	if err := Clone(t.Context(), filepath.Join(big, "none"), filepath.Join(big, "dst")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of nothing: %v", err)
	}
	onlyFiles(t, small, "lost+found")
	onlyFiles(t, big, "src")
}

// makeTree makes a tree with a little of everything.
func makeTree(t *testing.T) string {
	t.Helper()
	needRoot(t)
	root := t.TempDir()
	at := func(name string) string { return filepath.Join(root, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(at("etc/deep/er"), 0o755))
	must(os.MkdirAll(at("home/user"), 0o700))
	must(os.Chown(at("home/user"), 1000, 1000))
	must(os.WriteFile(at("etc/file"), []byte("hello"), 0o640))
	must(os.Chown(at("etc/file"), 12, 34))
	must(os.Link(at("etc/file"), at("etc/deep/link")))
	must(os.Symlink("file", at("etc/symlink")))
	must(os.WriteFile(at("setuid"), []byte("x"), 0o755))
	must(os.Chmod(at("setuid"), 0o755|os.ModeSetuid))
	must(unix.Setxattr(at("etc/file"), "user.color", []byte("blue"), 0))
	must(unix.Setxattr(at("setuid"), "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	must(unix.Mkfifo(at("fifo"), 0o600))
	writeSparse(t, at("sparse"), 300<<20, 3)
	for i := range 3000 { // a directory of many blocks, and many inodes
		must(os.WriteFile(at(fmt.Sprintf("etc/deep/a-rather-long-name-of-a-file-%d", i)), nil, 0o644))
	}
	return root
}

func TestAnImageHasTheWholeTree(t *testing.T) {
	root := makeTree(t)
	image := filepath.Join(t.TempDir(), "image")
	start := time.Now()
	if err := MakeExt4(t.Context(), root, image); err != nil {
		t.Fatal(err)
	}
	t.Logf("took %v", time.Since(start).Round(time.Millisecond))
	if got := stored(t, image); got > 40<<20 {
		t.Errorf("the image takes %d bytes", got)
	}
	check(t, image)

	dir := t.TempDir()
	loop, err := attach(image)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	if err := unix.Mount(loop.Name(), dir, "ext4", 0, "noinit_itable"); err != nil {
		t.Fatal(err)
	}
	defer Unmount(dir, image)
	sameTree(t, root, dir)
}

// sameTree compares two trees, but for times of access.
func sameTree(t *testing.T, a, b string) {
	t.Helper()
	n := 0
	err := filepath.WalkDir(a, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		n++
		name := strings.TrimPrefix(path, a)
		var x, y unix.Stat_t
		if err := errors.Join(unix.Lstat(path, &x), unix.Lstat(b+name, &y)); err != nil {
			return err
		}
		if name == "" { // belongs to the file system
			return nil
		}
		if x.Mode != y.Mode || x.Uid != y.Uid || x.Gid != y.Gid || x.Mtim.Sec != y.Mtim.Sec ||
			!d.IsDir() && (x.Nlink != y.Nlink || x.Size != y.Size) {
			t.Errorf("%s: %+v, want %+v", name, y, x)
		}
		if d.Type().IsRegular() {
			sameContent(t, path, b+name)
		}
		for _, attr := range []string{"user.color", "security.capability"} {
			v, w := make([]byte, 64), make([]byte, 64)
			i, _ := unix.Lgetxattr(path, attr, v)
			j, _ := unix.Lgetxattr(b+name, attr, w)
			if i != j || !bytes.Equal(v, w) {
				t.Errorf("%s: %s is %q, want %q", name, attr, w[:max(j, 0)], v[:max(i, 0)])
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n < 3000 {
		t.Errorf("compared only %d files", n)
	}
}

// check lets the file system's own tool look for faults.
func check(t *testing.T, image string) {
	t.Helper()
	fsck, err := findProgram("e2fsck", "e2fsprogs")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(fsck, "-fn", image).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v: %s", err, out)
	}
}

func TestAnImageMadeTwiceOfATreeIsTheSameButForItsTimes(t *testing.T) {
	root := makeTree(t)
	dir := t.TempDir()
	var sums [2][]byte
	for i := range sums {
		image := filepath.Join(dir, fmt.Sprint(i))
		if err := MakeExt4(t.Context(), root, image); err != nil {
			t.Fatal(err)
		}
		sums[i] = mustRead(t, image)
	}
	if len(sums[0]) != len(sums[1]) {
		t.Fatalf("%d and %d bytes", len(sums[0]), len(sums[1]))
	}
	differ := 0
	for at := 0; at < len(sums[0]); at += blockSize {
		if !bytes.Equal(sums[0][at:at+blockSize], sums[1][at:at+blockSize]) {
			differ++
		}
	}
	// Superblocks and the inodes that the tool makes itself; newer ones take their
	// times from the environment.
	if differ > 400 {
		t.Errorf("%d of %d blocks differ", differ, len(sums[0])/blockSize)
	}
	t.Logf("%d of %d blocks differ", differ, len(sums[0])/blockSize)
}

// growTo is EXT4_IOC_RESIZE_FS.
func growTo(t *testing.T, dir string, blocks uint64) {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	err = ioctlPtr(d.Fd(), 0x40086610, &blocks)
	if errors.Is(err, unix.EPERM) {
		t.Skip("needs the right to use up resources, which root lacks here")
	}
	if err != nil {
		t.Fatalf("grow to %d blocks: %v", blocks, err)
	}
}

func TestAnImageGrowsWhileItIsMounted(t *testing.T) {
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "file"), []byte("hello"), 0o644); err != nil {
		t.Fatal(err)
	}
	needRoot(t)
	for _, size := range []int64{10 << 30, 1 << 40} {
		t.Run(fmt.Sprint(size>>30, "GiB"), func(t *testing.T) {
			image := filepath.Join(mountNew(t, "xfs", 1<<30), "image") // files of any size
			if err := MakeExt4(t.Context(), root, image); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(image, size); err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			loop, err := attach(image)
			if err != nil {
				t.Fatal(err)
			}
			defer loop.Close()
			if err := unix.Mount(loop.Name(), dir, "ext4", 0, "noinit_itable"); err != nil {
				t.Fatal(err)
			}
			defer Unmount(dir, image)
			start := time.Now()
			growTo(t, dir, uint64(size/blockSize))
			took := time.Since(start)
			var st unix.Statfs_t
			if err := unix.Statfs(dir, &st); err != nil {
				t.Fatal(err)
			}
			if got := int64(st.Bavail) * st.Bsize; got < size/100*95 {
				t.Errorf("%d MiB free of %d", got>>20, size>>20)
			}
			t.Logf("growing took %v; %d MiB of inodes and tables are stored", took.Round(time.Millisecond), stored(t, image)>>20)
			if err := Unmount(dir, image); err != nil {
				t.Fatal(err)
			}
			check(t, image)
		})
	}
}

func TestAnImageThatDoesNotFitLeavesNothing(t *testing.T) {
	root := makeTree(t)
	if err := os.WriteFile(filepath.Join(root, "large"), bytes.Repeat([]byte("large"), 8<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	dir := mountNew(t, "ext4", 16<<20)
	if err := MakeExt4(t.Context(), root, filepath.Join(dir, "image")); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("got %v, want ErrExhausted", err)
	}
	onlyFiles(t, dir, "lost+found")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := MakeExt4(ctx, root, filepath.Join(dir, "image")); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of its context: %v", err)
	}
	onlyFiles(t, dir, "lost+found")
}

func TestMountGivesReflinksWhereThereAreNone(t *testing.T) {
	host := mountNew(t, "ext4", 512<<20)
	dir, file := filepath.Join(host, "dir"), filepath.Join(host, "data.xfs")
	const size = 4 << 30 // more than there is
	for range 3 {
		if err := Mount(t.Context(), dir, file, size); err != nil {
			t.Fatal(err)
		}
		if n := mountsAt(t, dir); n != 1 {
			t.Fatalf("%d mounts at %s", n, dir)
		}
	}
	defer Unmount(dir, file)
	if ok, err := HoldsReflinks(dir); !ok || err != nil {
		t.Errorf("HoldsReflinks: %v, %v", ok, err)
	}
	if got := stored(t, file); got > 128<<20 {
		t.Errorf("an empty file system takes %d MiB", got>>20)
	}
	if err := os.WriteFile(filepath.Join(dir, "kept"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Unmount(dir, file); err != nil {
			t.Fatal(err)
		}
	}
	if n := loopsOf(t, file); n != 0 {
		t.Errorf("%d loop devices are left", n)
	}
	if err := Mount(t.Context(), dir, file, size); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "kept")); err != nil {
		t.Error("after it was mounted again:", err)
	}
	if err := Unmount(dir, file); err != nil {
		t.Fatal(err)
	}
	onlyFiles(t, host, "dir", "data.xfs", "lost+found")
}

func TestMountMakesNothingWhereThereAreReflinks(t *testing.T) {
	host := mountNew(t, "xfs", 512<<20)
	if err := Mount(t.Context(), filepath.Join(host, "dir"), filepath.Join(host, "file"), 1<<30); err != nil {
		t.Fatal(err)
	}
	onlyFiles(t, host, "dir")
}

func mountsAt(t *testing.T, dir string) int {
	t.Helper()
	return strings.Count(string(mustRead(t, "/proc/self/mountinfo")), " "+dir+" ")
}

// loopsOf is how many loop devices have the file. The kernel detaches one soon
// after its last user has gone.
func loopsOf(t *testing.T, file string) int {
	t.Helper()
	found, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, path := range found {
		if text, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(text)) == file {
			n++
		}
	}
	return n
}

// killMount makes the test binary a process that mounts until it is killed.
var killMount = os.Getenv("WRENN_DISK_TEST_MOUNT")

func TestMain(m *testing.M) {
	if killMount != "" {
		dir, file, _ := strings.Cut(killMount, ":")
		fmt.Println("begin")
		if err := Mount(context.Background(), dir, file, 1<<30); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestMountAfterOneThatWasKilled(t *testing.T) {
	host := mountNew(t, "ext4", 512<<20)
	dir, file := filepath.Join(host, "dir"), filepath.Join(host, "data.xfs")
	defer Unmount(dir, file)
	killed := 0
	for round := range 25 {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{"WRENN_DISK_TEST_MOUNT=" + dir + ":" + file, "PATH=" + os.Getenv("PATH")}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 6)); err != nil {
			t.Fatal(err)
		}
		// At all points between begin and end, which takes some 50 ms.
		time.Sleep(time.Duration(round) * 3 * time.Millisecond)
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		if err := cmd.Wait(); err != nil {
			killed++
		}
		if err := Mount(t.Context(), dir, file, 1<<30); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if n := mountsAt(t, dir); n != 1 {
			t.Fatalf("round %d: %d mounts", round, n)
		}
		if n := loopsOf(t, file); n != 1 {
			t.Fatalf("round %d: %d loop devices", round, n)
		}
		if err := Unmount(dir, file); err != nil {
			t.Fatal(err)
		}
		if round%2 == 0 {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("%d of 25 were killed before they ended", killed)
	if killed == 0 {
		t.Error("none was killed before it ended")
	}
}

func TestMountAgainWhileTheOldOneIsInUse(t *testing.T) {
	host := mountNew(t, "ext4", 512<<20)
	dir, file := filepath.Join(host, "dir"), filepath.Join(host, "data.xfs")
	if err := Mount(t.Context(), dir, file, 1<<30); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "open"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Unmount(dir, file); err != nil {
		t.Fatal(err)
	}
	if err := Mount(t.Context(), dir, file, 1<<30); err != nil {
		t.Fatal(err)
	}
	defer Unmount(dir, file)
	if _, err := f.WriteString("written by who has it open"); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "open")); err != nil || len(got) == 0 {
		t.Errorf("it reads %q, %v", got, err)
	}
	if n := loopsOf(t, file); n != 1 {
		t.Errorf("%d loop devices", n)
	}
}
