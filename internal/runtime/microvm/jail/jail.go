// Package jail starts a virtual machine's monitor so that one who takes it over
// from inside the machine has gained next to nothing: a user of its own without
// rights, a root directory that holds what the monitor needs and no more, the
// namespaces of its slot, and the limits of its cgroup. It does what Firecracker's
// jailer does, for any monitor.
//
// Nothing is executed for it: a thread of this process enters the namespaces, builds
// the root directory, gives up what it may not pass on, and forks the monitor off.
// The thread ends with that. The mounts are those of the monitor's mount namespace
// and end with the monitor.
//
// Where Firecracker's jailer is to do it, the thread prepares the directory that the
// jailer makes the root of, and starts the jailer, which becomes the monitor.
package jail

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/cgroup"
	"github.com/wrenn/wrenn/internal/process"
)

// Config is how a monitor is started.
type Config struct {
	Root    string       // empty directory on the host to mount the root directory on
	Mounts  []Mount      // what of the host is in it
	Devices []Device     // character devices
	Program string       // path of the monitor, as it is in the jail
	Args    []string     // without argv[0]
	Files   []*os.File   // open from descriptor 3 on
	Stdout  *os.File     // of the monitor, and its errors; nil: nowhere
	Dir     string       // its working directory, as it is in the jail
	UID     uint32       // user and group of its own
	NetNS   string       // path of the network namespace
	Cgroups cgroup.Trees // in which Group is
	Group   string       // made by the caller
	Proc    bool         // /proc with its own processes in it, and nothing else
	MaxFile int64        // size of the largest file it may write; 0: any
	Jailer  *Jailer      // does what comes after the mounts; nil: this package does

	// Inside is called on the thread once it is in the network namespace and
	// before it has given up anything. Files that it opens may be added to Files.
	Inside func(c *Config) error

	leave func() error // takes the thread out of the group
	group *os.File     // its directory in the cgroup tree of version 2; nil where there is none
}

// Mount is a file or directory of the host that is seen in the jail.
type Mount struct {
	From     string // on the host
	To       string // in the jail, absolute
	Writable bool
}

// Device is a character device that the monitor may use. It is left out where the
// host has none.
type Device struct {
	Path string // on the host and in the jail
}

// System is what a dynamically linked program of the host needs to run.
var System = []Mount{
	{From: "/usr", To: "/usr"}, {From: "/lib", To: "/lib"}, {From: "/lib64", To: "/lib64"},
	{From: "/etc/ld.so.cache", To: "/etc/ld.so.cache"},
}

// Start starts the monitor. It goes on when this process ends.
func Start(ctx context.Context, c Config) (process.ID, error) {
	if err := ctx.Err(); err != nil {
		return process.ID{}, err
	}
	var (
		pid  int
		err  error
		done = make(chan struct{})
	)
	onThread(func() {
		defer close(done)
		pid, err = c.start()
		err = errors.Join(err, c.out())
	})
	<-done
	var id process.ID
	if err == nil { // out here, where there is /proc
		id, err = process.Identify(pid)
	}
	if err != nil {
		if pid > 0 {
			_ = unix.Kill(pid, unix.SIGKILL)
			_, _ = unix.Wait4(pid, nil, 0, nil)
		}
		return process.ID{}, fmt.Errorf("start %s in its jail: %w", filepath.Base(c.Program), err)
	}
	return id, nil
}

// onThread runs f on a thread of its own, which ends with f. The process's first
// thread cannot end, and what becomes of it is seen as the process's own mounts and
// root: it is held back while another one does the work.
func onThread(f func()) {
	go func() {
		goruntime.LockOSThread() // and not unlocked: so the thread ends
		if unix.Gettid() != os.Getpid() {
			f()
			return
		}
		over := make(chan struct{})
		go func() {
			defer close(over)
			goruntime.LockOSThread()
			f()
		}()
		<-over
		goruntime.UnlockOSThread()
	}()
}

// start starts the monitor and returns its pid.
func (c *Config) start() (pid int, err error) {
	if err := c.enter(); err != nil {
		return 0, err
	}
	if c.Inside != nil {
		if err := c.Inside(c); err != nil {
			return 0, err
		}
	}
	var cmd *exec.Cmd
	if c.Jailer != nil {
		cmd, err = c.prepareJailer()
	} else {
		cmd, err = c.prepare()
	}
	if err != nil {
		return 0, err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return 0, fmt.Errorf("set no_new_privs: %w", err)
	}
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, null, null
	if c.Stdout != nil {
		cmd.Stdout, cmd.Stderr = c.Stdout, c.Stdout
	}
	cmd.SysProcAttr.Setsid = true
	cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS | syscall.CLONE_NEWPID
	if c.group != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(c.group.Fd())
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	// It is waited for by whoever holds it, by a pidfd.
	pid = cmd.Process.Pid
	return pid, errors.Join(c.limit(pid), cmd.Process.Release())
}

// maxOpen is how many files a monitor may have open: what Firecracker's jailer allows.
const maxOpen = 2048

// limit bounds what the monitor, which has not been told anything yet, can take. The
// jailer does so itself.
func (c *Config) limit(pid int) error {
	if c.Jailer != nil {
		return nil
	}
	// Who sets another process's limits must have its user, or a right that root has
	// not got everywhere. It is this thread alone that becomes it, in name: what it may
	// do stays, and it ends soon.
	for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
		const unchanged = ^uintptr(0)
		if _, _, errno := unix.RawSyscall(call, uintptr(c.UID), unchanged, unchanged); errno != 0 {
			return fmt.Errorf("become the monitor's user: %w", errno)
		}
	}
	limits := map[int]uint64{unix.RLIMIT_NOFILE: maxOpen}
	if c.MaxFile != 0 {
		limits[unix.RLIMIT_FSIZE] = uint64(c.MaxFile)
	}
	for resource, n := range limits {
		if err := unix.Prlimit(pid, resource, &unix.Rlimit{Cur: n, Max: n}, nil); err != nil {
			return fmt.Errorf("limit resource %d of the monitor: %w", resource, err)
		}
	}
	return nil
}

// prepare makes the thread what the monitor is to be, but for the user.
func (c *Config) prepare() (*exec.Cmd, error) {
	if err := c.buildRoot(); err != nil {
		return nil, fmt.Errorf("build root directory: %w", err)
	}
	if err := keepCapabilities(); err != nil {
		return nil, err
	}
	return &exec.Cmd{
		Path: c.Program, Args: append([]string{filepath.Base(c.Program)}, c.Args...),
		Env: []string{"PATH=/usr/bin:/bin", "HOME=/", "TMPDIR=/tmp"}, Dir: c.Dir, ExtraFiles: c.Files,
		SysProcAttr: &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: c.UID, Gid: c.UID}},
	}, nil
}

// out takes the thread out of the group again, which is looked through for processes
// to end.
func (c *Config) out() error {
	if c.group != nil {
		c.group.Close()
	}
	if c.leave == nil {
		return nil
	}
	return c.leave()
}

// enter takes the thread into the cgroup and the namespaces.
func (c *Config) enter() error {
	if c.Group != "" {
		var err error
		if c.leave, err = c.Cgroups.Enter(c.Group); err != nil {
			return err
		}
		if c.group, err = c.Cgroups.Directory(c.Group); err != nil {
			return fmt.Errorf("enter cgroup: %w", err)
		}
	}
	ns, err := os.Open(c.NetNS)
	if err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
	ns.Close()
	if err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("make mount namespace: %w", err)
	}
	// What is mounted from here on is seen in this namespace alone.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	return nil
}

// buildRoot mounts the root directory and makes it the thread's.
func (c *Config) buildRoot() error {
	root := c.Root
	if err := unix.Mount("jail", root, "tmpfs", unix.MS_NOSUID, "size=1m,nr_inodes=1k,mode=0755"); err != nil {
		return fmt.Errorf("mount it: %w", err)
	}
	for _, dir := range []string{"dev/net", "tmp", "old", "proc"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	for _, m := range c.Mounts {
		if err := bind(m, root); err != nil {
			return fmt.Errorf("mount %s: %w", m.From, err)
		}
	}
	for _, d := range append([]Device{{"/dev/null"}, {"/dev/zero"}, {"/dev/urandom"}}, c.Devices...) {
		if err := c.makeDevice(d, root); err != nil {
			return fmt.Errorf("make device %s: %w", d.Path, err)
		}
	}
	if c.Proc {
		if err := unix.Mount("proc", filepath.Join(root, "proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "hidepid=invisible,subset=pid"); err != nil {
			return fmt.Errorf("mount /proc: %w", err)
		}
	}
	if err := unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID, "size=1m,nr_inodes=1k"); err != nil {
		return fmt.Errorf("make it read-only: %w", err)
	}
	if err := unix.PivotRoot(root, filepath.Join(root, "old")); err != nil {
		return fmt.Errorf("change to it: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Unmount("/old", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the host's: %w", err)
	}
	return nil
}

// bind puts one file or directory of the host into the jail. A symbolic link, as
// /lib is, stays one.
func bind(m Mount, root string) error {
	to := filepath.Join(root, m.To)
	info, err := os.Lstat(m.From)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	switch {
	case info.Mode()&os.ModeSymlink != 0:
		target, err := os.Readlink(m.From)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	case info.IsDir():
		err = os.MkdirAll(to, 0o755)
	default:
		err = os.WriteFile(to, nil, 0o644)
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(m.From, to, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	flags := uintptr(unix.MS_BIND | unix.MS_REMOUNT | unix.MS_NOSUID | unix.MS_NODEV)
	if !m.Writable {
		flags |= unix.MS_RDONLY
	}
	return unix.Mount("", to, "", flags, "")
}

func (c *Config) makeDevice(d Device, root string) error {
	var st unix.Stat_t
	err := unix.Stat(d.Path, &st)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	path := filepath.Join(root, d.Path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(st.Rdev)); err != nil {
		return err
	}
	return os.Chown(path, int(c.UID), int(c.UID))
}

// keepCapabilities takes every capability but those that are kept out of what the
// thread's children can ever have. They lose what they have by becoming another user.
func keepCapabilities(kept ...int) error {
	for c := 0; c <= unix.CAP_LAST_CAP; c++ {
		if slices.Contains(kept, c) {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0)
		if err != nil && !errors.Is(err, unix.EINVAL) { // a kernel without this one
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	return nil
}

// Path gives the path in the jail of a file on the host, by what is mounted.
func Path(mounts []Mount, host string) (string, bool) {
	for _, m := range mounts {
		if host == m.From {
			return m.To, true
		}
		if rest, ok := strings.CutPrefix(host, m.From+"/"); ok {
			return filepath.Join(m.To, rest), true
		}
	}
	return "", false
}
