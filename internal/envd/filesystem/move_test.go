package filesystem

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// otherFS mounts a file system of its own, of size bytes as tmpfs takes them.
func otherFS(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if os.Getuid() != 0 {
		t.Skip("only root can mount")
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("cannot mount: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	var list []string
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return strings.Join(list, " ")
}

func TestMoveToAnotherFileSystemKeepsEverything(t *testing.T) {
	to := otherFS(t, "64m")
	from := filepath.Join(t.TempDir(), "tree")
	past := time.Unix(1e9, 123456789)
	must(t, os.MkdirAll(from+"/d", 0o750), os.WriteFile(from+"/d/f", []byte("content"), 0o640),
		os.Lchown(from+"/d/f", 1234, 4321), os.Chmod(from+"/d/f", os.ModeSetuid|0o711),
		os.Link(from+"/d/f", from+"/hard"), os.Symlink("../nowhere", from+"/d/sym"),
		unix.Mkfifo(from+"/fifo", 0o622), unix.Mknod(from+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		unix.Lsetxattr(from+"/d", "trusted.key", []byte("value"), 0))
	sparse, err := os.Create(from + "/sparse")
	must(t, err)
	_, err = sparse.WriteAt([]byte("middle"), 512<<20)
	must(t, err, sparse.Truncate(1<<30), sparse.Close())
	must(t, os.Chmod(from+"/d", 0o500), os.Chtimes(from+"/d/f", past, past), os.Chtimes(from+"/d", past, past))

	must(t, move(t.Context(), from, to+"/moved"))
	if _, err := os.Lstat(from); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the source: %v", err)
	}
	if got := names(t, to); got != "moved" {
		t.Errorf("at the target: %s", got)
	}
	var f, hard, d, null, hole unix.Stat_t
	must(t, unix.Lstat(to+"/moved/d/f", &f), unix.Lstat(to+"/moved/hard", &hard), unix.Lstat(to+"/moved/d", &d),
		unix.Lstat(to+"/moved/null", &null), unix.Lstat(to+"/moved/sparse", &hole))
	if f.Uid != 1234 || f.Gid != 4321 || f.Mode&0o7777 != 0o4711 || f.Mtim.Nano() != past.UnixNano() || f.Ino != hard.Ino {
		t.Errorf("file %+v, its other name has inode %d", f, hard.Ino)
	}
	if d.Mode&0o7777 != 0o500 || d.Mtim.Nano() != past.UnixNano() {
		t.Errorf("directory %+v", d)
	}
	if null.Mode&unix.S_IFMT != unix.S_IFCHR || null.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("device %+v", null)
	}
	if hole.Size != 1<<30 || hole.Blocks*512 > 1<<20 {
		t.Errorf("the sparse file has %d bytes and takes %d", hole.Size, hole.Blocks*512)
	}
	got := make([]byte, 6)
	r, err := os.Open(to + "/moved/sparse")
	must(t, err)
	defer r.Close()
	if _, err := r.ReadAt(got, 512<<20); err != nil || string(got) != "middle" {
		t.Errorf("between its holes: %q, %v", got, err)
	}
	if link, err := os.Readlink(to + "/moved/d/sym"); link != "../nowhere" {
		t.Errorf("link to %q, %v", link, err)
	}
	value := make([]byte, 16)
	if n, err := unix.Lgetxattr(to+"/moved/d", "trusted.key", value); err != nil || string(value[:n]) != "value" {
		t.Errorf("attribute %q, %v", value[:max(n, 0)], err)
	}
}

func TestAMoveThatFailsLeavesTheSourceWholeAndNothingElse(t *testing.T) {
	to := otherFS(t, "1m")
	from := filepath.Join(t.TempDir(), "tree")
	must(t, os.MkdirAll(from+"/d", 0o755), os.WriteFile(from+"/d/a", make([]byte, 100<<10), 0o644),
		os.WriteFile(from+"/d/big", make([]byte, 4<<20), 0o644), os.WriteFile(to+"/old", []byte("old"), 0o644), os.Mkdir(to+"/dir", 0o755))
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tc := range []struct {
		name     string
		ctx      context.Context
		from, to string
		want     error
	}{
		{"no room", t.Context(), from, to + "/new", syscall.ENOSPC},
		{"no room, over a file", t.Context(), from + "/d/big", to + "/old", syscall.ENOSPC},
		{"given up", ended, from, to + "/new", context.Canceled},
		{"over a directory", t.Context(), from + "/d/a", to + "/dir", syscall.EEXIST},
		{"a directory over a file", t.Context(), from, to + "/old", syscall.ENOTDIR},
		{"into itself", t.Context(), from, from + "/d/x", syscall.EINVAL},
		{"a mount point", t.Context(), to, from + "/x", syscall.EINVAL},
	} {
		err := move(tc.ctx, tc.from, tc.to)
		if tc.name == "a mount point" {
			if !errors.Is(err, syscall.EBUSY) && !errors.Is(err, syscall.EINVAL) {
				t.Errorf("%s: got %v", tc.name, err)
			}
		} else if !errors.Is(err, tc.want) {
			t.Errorf("%s: got %v, want %v", tc.name, err, tc.want)
		}
		if got := names(t, to); got != "dir old" {
			t.Errorf("%s: at the target is %s", tc.name, got)
		}
		if info, err := os.Stat(from + "/d/big"); err != nil || info.Size() != 4<<20 || names(t, from+"/d") != "a big" {
			t.Errorf("%s: the source is not whole: %v", tc.name, err)
		}
	}
	must(t, move(t.Context(), from, from)) // as rename(2) does it
	if old, _ := os.ReadFile(to + "/old"); string(old) != "old" {
		t.Errorf("the file at the target is %q", old)
	}
}

func TestADirectoryIsNotMovedIntoItselfByWayOfAMount(t *testing.T) {
	fs := otherFS(t, "8m")
	must(t, os.MkdirAll(fs+"/dir/sub", 0o755), os.WriteFile(fs+"/dir/f", make([]byte, 1<<20), 0o644), os.Mkdir(fs+"/mount", 0o755),
		unix.Mount(fs+"/dir/sub", fs+"/mount", "", unix.MS_BIND, ""))
	t.Cleanup(func() { unix.Unmount(fs+"/mount", unix.MNT_DETACH) })
	if err := move(t.Context(), fs+"/dir", fs+"/mount/new"); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("got %v", err)
	}
	if got := names(t, fs+"/dir") + ", " + names(t, fs+"/mount"); got != "f sub, " {
		t.Errorf("left: %s", got)
	}
}

func TestMountsAreFoundByTheirRealPath(t *testing.T) {
	mounts := []byte("22 1 0:21 / /proc rw shared:5 - proc proc rw\n23 1 0:22 / /mnt/with\\040space rw - tmpfs tmpfs rw\nbroken\n24 1 0:2 / / rw - x y z\n")
	for path, want := range map[string]string{
		"/proc": "/proc", "/proc/1": "", "/pro": "", "/mnt": "/mnt/with space", "/mnt/with space": "/mnt/with space", "/": "/proc", "/mnt/with": "",
	} {
		if got := findMount(mounts, path); got != want {
			t.Errorf("%s: got %q, want %q", path, got, want)
		}
	}
	fs := otherFS(t, "1m")
	must(t, os.WriteFile(fs+"/f", nil, 0o644), os.Symlink(filepath.Dir(fs), filepath.Dir(fs)+"-link"))
	t.Cleanup(func() { os.Remove(filepath.Dir(fs) + "-link") })
	if got := mountAt(filepath.Dir(fs) + "-link/" + filepath.Base(fs)); got != fs {
		t.Errorf("through a link: %q, want %q", got, fs)
	}
	if got := mountAt(fs + "/f"); got != "" {
		t.Errorf("in a mount: %q", got)
	}
}

func FuzzMountinfo(f *testing.F) {
	f.Add([]byte("22 1 0:21 / /proc rw\n"), "/proc")
	f.Add([]byte("a b c d \\04\\0999\\400 x"), "")
	f.Fuzz(func(t *testing.T, info []byte, path string) {
		if got := findMount(info, path); got != "" && !strings.HasPrefix(got, strings.TrimSuffix(path, "/")) {
			t.Errorf("%q is not at or below %q", got, path)
		}
	})
}
