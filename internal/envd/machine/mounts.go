package machine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// mountPoint is a filesystem that programs expect.
type mountPoint struct {
	path, fs, data string
	flags          uintptr
	optional       bool // kernels without it are fine
}

// mountPoints are in the order of mounting. /tmp is not among them: it stays on
// the disk, where files larger than the memory fit.
var mountPoints = []mountPoint{
	{path: "proc", fs: "proc", flags: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	{path: "sys", fs: "sysfs", flags: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	{path: "dev", fs: "devtmpfs", data: "mode=0755", flags: unix.MS_NOSUID},
	{path: "dev/pts", fs: "devpts", data: "ptmxmode=0666,mode=0620,gid=5", flags: unix.MS_NOSUID | unix.MS_NOEXEC},
	{path: "dev/shm", fs: "tmpfs", data: "mode=1777", flags: unix.MS_NOSUID | unix.MS_NODEV},
	{path: "dev/mqueue", fs: "mqueue", flags: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, optional: true},
	{path: "run", fs: "tmpfs", data: "mode=0755,size=20%", flags: unix.MS_NOSUID | unix.MS_NODEV},
	{path: "sys/fs/cgroup", fs: "cgroup2", flags: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, optional: true},
}

// deviceLinks are names that no driver makes.
var deviceLinks = [][2]string{
	{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"},
	{"pts/ptmx", "ptmx"}, // where the kernel has made no such device
}

// mountAll mounts what is missing below root and returns what did not work.
func mountAll(root string) (problems []error) {
	add := func(err error) {
		if err != nil {
			problems = append(problems, err)
		}
	}
	add(makeWritable(root))
	for _, m := range mountPoints {
		if err := m.mount(root); err != nil && !m.optional {
			add(fmt.Errorf("%s: %w", m.path, err))
		}
	}
	for _, link := range deviceLinks {
		err := os.Symlink(link[0], filepath.Join(root, "dev", link[1]))
		if !errors.Is(err, fs.ErrExist) {
			add(err)
		}
	}
	add(sharedDir(filepath.Join(root, "tmp")))
	add(sharedDir(filepath.Join(root, "run/lock")))
	return problems
}

func (m mountPoint) mount(root string) error {
	path := filepath.Join(root, m.path)
	if mounted, err := isMountPoint(path); err == nil && mounted {
		return nil
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return err
	}
	err := unix.Mount(m.fs, path, m.fs, m.flags, m.data)
	if err != nil && m.fs == "devtmpfs" {
		return errors.Join(err, staticDevices(path))
	}
	return err
}

// staticDevices makes the devices that every program needs, for kernels that
// make none themselves.
func staticDevices(dir string) error {
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID, "mode=0755"); err != nil {
		return err
	}
	for _, d := range []struct {
		name         string
		major, minor uint32
	}{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}} {
		path := filepath.Join(dir, d.name)
		if err := unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("make device %s: %w", d.name, err)
		}
		if err := os.Chmod(path, 0o666); err != nil { // whatever the umask
			return err
		}
	}
	return nil
}

// isMountPoint compares devices, for which nothing has to be mounted.
func isMountPoint(path string) (bool, error) {
	var here, above unix.Stat_t
	if err := unix.Lstat(path, &here); err != nil {
		return false, err
	}
	if err := unix.Lstat(filepath.Dir(path), &above); err != nil {
		return false, err
	}
	return here.Dev != above.Dev, nil
}

// makeWritable undoes the read-only mount that kernels start with.
func makeWritable(root string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return err
	}
	if st.Flags&unix.ST_RDONLY == 0 {
		return nil
	}
	if err := unix.Mount("", root, "", unix.MS_REMOUNT, ""); err != nil {
		return fmt.Errorf("make the root writable: %w", err)
	}
	return nil
}

// sharedDir makes a directory that everybody may write to.
func sharedDir(path string) error {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return err
	}
	return os.Chmod(path, 0o777|fs.ModeSticky)
}

// sysctls are what a sandbox's users would otherwise run into, and what ends a
// machine whose kernel has failed rather than leave it hanging.
var sysctls = [][2]string{
	{"kernel/panic", "1"},
	{"kernel/printk", "3 4 1 3"},               // little on the console: it is slow, and its reader the host
	{"fs/inotify/max_user_instances", "65536"}, // each watch that a client holds is one
	{"fs/inotify/max_user_watches", "1048576"},
	{"vm/max_map_count", "262144"},
	{"net/ipv4/ping_group_range", "0 2147483647"}, // ping without privileges
}

// setSysctls sets what is below dir. A kernel without one, or that does not let
// it be changed, is left as it is.
func setSysctls(dir string) (problems []error) {
	for _, s := range sysctls {
		err := os.WriteFile(filepath.Join(dir, s[0]), []byte(s[1]), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, syscall.EROFS) {
			problems = append(problems, fmt.Errorf("%s: %w", s[0], err))
		}
	}
	return problems
}

// mountedBelow returns what is mounted, the last first, from the text of a
// mountinfo file, without the root and without what has nothing on a disk.
func mountedBelow(mountinfo string) (paths []string) {
	for line := range strings.Lines(mountinfo) {
		left, right, found := strings.Cut(line, " - ")
		fields, kind := strings.Fields(left), strings.Fields(right)
		if !found || len(fields) < 5 || len(kind) < 1 {
			continue
		}
		switch kind[0] {
		case "proc", "sysfs", "devtmpfs", "devpts", "cgroup2", "mqueue":
			continue
		}
		if path := unescape(fields[4]); path != "/" {
			paths = append([]string{path}, paths...)
		}
	}
	return paths
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// keepWorkingSet has the kernel end a process when memory is so short that what was
// used in the last second would have to go. Without it a machine that has no swap
// spends minutes reading its own programs from the disk again and again before that.
// Interface: kernel documentation, admin-guide/mm/multigen_lru.rst; Linux 6.1.
func keepWorkingSet(sys string) error {
	dir := filepath.Join(sys, "kernel/mm/lru_gen")
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "enabled"), []byte("y"), 0),
		os.WriteFile(filepath.Join(dir, "min_ttl_ms"), []byte("1000"), 0),
	)
}
