package fake

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// JailerPrefix is what the name of the program begins with that answers like
// Firecracker's jailer. The version follows.
const JailerPrefix = "jailer-"

// IsJailer says whether this process was started as the fake jailer, by its name.
func IsJailer() bool { return strings.HasPrefix(filepath.Base(os.Args[0]), JailerPrefix+"1.") }

// Jailer is the program. It does in the order of the original what that does, and
// fails where that would: the monitor is found by its canonical path and copied, the
// directory that is made the root may have mounts below it, devices must not be there.
func Jailer() int {
	runtime.LockOSThread() // what becomes the monitor is this thread
	if err := runJailer(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

type jailer struct {
	id, exec, base, netns string
	uid, gid              uint64
	limits                []string
	rest                  []string
	userfaultfd           uint32 // minor number of its device; 0: there is none
}

var instanceID = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)

func runJailer() error {
	j, err := parseJailer()
	if j == nil || err != nil {
		return err
	}
	name := filepath.Base(j.exec)
	root := filepath.Join(j.base, name, j.id, "root")
	if err := os.MkdirAll(root, 0o777); err != nil {
		return fmt.Errorf("failed to create directory %s: %w", root, err)
	}
	if err := j.copy(filepath.Join(root, name)); err != nil {
		return err
	}
	if j.netns != "" {
		ns, err := os.Open(j.netns)
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
			ns.Close()
		}
		if err != nil {
			return fmt.Errorf("failed to join network namespace: netns: %w", err)
		}
	}
	if err := j.limit(); err != nil {
		return err
	}
	if err := enterRoot(root); err != nil {
		return err
	}
	if err := j.devices(); err != nil {
		return err
	}
	return j.become("/" + name)
}

// parseJailer reads the command line. nil: there is nothing to do.
func parseJailer() (*jailer, error) {
	for fd := range 64 {
		if fd > 2 {
			unix.CloseOnExec(fd) // the original closes what it inherits
		}
	}
	args, rest := os.Args[1:], []string(nil)
	for i, a := range args {
		if a == "--" {
			args, rest = args[:i], args[i+1:]
			break
		}
	}
	j := &jailer{rest: rest, userfaultfd: findUserfaultfd()}
	flags := flag.NewFlagSet("jailer", flag.ContinueOnError)
	show := flags.Bool("version", false, "")
	flags.StringVar(&j.id, "id", "", "")
	flags.StringVar(&j.exec, "exec-file", "", "")
	uid, gid := flags.String("uid", "", ""), flags.String("gid", "", "")
	flags.StringVar(&j.base, "chroot-base-dir", "/srv/jailer", "")
	flags.StringVar(&j.netns, "netns", "", "")
	flags.Func("resource-limit", "", func(s string) error { j.limits = append(j.limits, s); return nil })
	if err := flags.Parse(args); err != nil {
		return nil, fmt.Errorf("failed to parse arguments: %w", err)
	}
	if *show {
		fmt.Printf("Jailer v%s\n\n", strings.TrimPrefix(filepath.Base(os.Args[0]), JailerPrefix))
		return nil, nil
	}
	if !instanceID.MatchString(j.id) {
		return nil, fmt.Errorf("invalid instance ID: %q", j.id)
	}
	var errs [4]error
	j.exec, errs[0] = filepath.EvalSymlinks(j.exec)
	j.base, errs[1] = filepath.EvalSymlinks(j.base)
	j.uid, errs[2] = strconv.ParseUint(*uid, 10, 32)
	j.gid, errs[3] = strconv.ParseUint(*gid, 10, 32)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, fmt.Errorf("failed to parse arguments: %w", err)
	}
	// The older ones of those that are supported.
	if !strings.Contains(filepath.Base(j.exec), "firecracker") {
		return nil, fmt.Errorf("jailer's exec-file must contain firecracker: %s", j.exec)
	}
	return j, nil
}

// findUserfaultfd reads the list of devices of the kernel, as the original does.
func findUserfaultfd() uint32 {
	list, err := os.ReadFile("/proc/misc")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(list)) {
		if fields := strings.Fields(line); len(fields) == 2 && fields[1] == "userfaultfd" {
			n, _ := strconv.ParseUint(fields[0], 10, 32)
			return uint32(n)
		}
	}
	return 0
}

func (j *jailer) copy(to string) error {
	src, err := os.Open(j.exec)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Chown(int(j.uid), int(j.gid)), dst.Close())
}

func (j *jailer) limit() error {
	limits := map[int]uint64{unix.RLIMIT_NOFILE: 2048}
	for _, l := range j.limits {
		name, value, _ := strings.Cut(l, "=")
		resource, ok := map[string]int{"fsize": unix.RLIMIT_FSIZE, "no-file": unix.RLIMIT_NOFILE}[name]
		n, err := strconv.ParseUint(value, 10, 64)
		if !ok || err != nil {
			return fmt.Errorf("invalid resource argument: %s", l)
		}
		limits[resource] = n
	}
	for resource, n := range limits {
		// Not by package syscall, by which Go would put back at the exec what it has raised.
		if err := unix.Prlimit(0, resource, &unix.Rlimit{Cur: n, Max: n}, nil); err != nil {
			return fmt.Errorf("failed to set limit for resource: %w", err)
		}
	}
	return nil
}

// enterRoot makes the directory the root.
func enterRoot(root string) error {
	for _, step := range []func() error{
		func() error { return unix.Unshare(unix.CLONE_NEWNS) },
		func() error { return unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, "") },
		func() error { return unix.Mount(root, root, "", unix.MS_BIND|unix.MS_REC, "") },
		func() error { return unix.Chdir(root) },
		func() error { return unix.Mkdir("old_root", 0o600) },
		func() error { return unix.PivotRoot(".", "old_root") },
		func() error { return unix.Chdir("/") },
		func() error { return unix.Unmount("old_root", unix.MNT_DETACH) },
		func() error { return unix.Rmdir("old_root") },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("failed to pivot root: %w", err)
		}
	}
	return nil
}

func (j *jailer) devices() error {
	for _, dir := range []string{"/", "/dev", "/dev/net", "/run"} {
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.Chmod(dir, 0o700), os.Chown(dir, int(j.uid), int(j.gid))); err != nil {
			return err
		}
	}
	devices := map[string]uint64{"/dev/net/tun": unix.Mkdev(10, 200), "/dev/kvm": unix.Mkdev(10, 232), "/dev/urandom": unix.Mkdev(1, 9)}
	if j.userfaultfd != 0 {
		devices["/dev/userfaultfd"] = unix.Mkdev(10, j.userfaultfd)
	}
	for path, number := range devices {
		if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(number)); err != nil {
			return fmt.Errorf("failed to create %s via mknod inside the jail: %w", path, err)
		}
		if err := os.Chown(path, int(j.uid), int(j.gid)); err != nil {
			return err
		}
	}
	return nil
}

// become gives up what root has, on this thread alone, and executes the monitor.
func (j *jailer) become(program string) error {
	for _, call := range [][2]uintptr{{unix.SYS_SETGROUPS, 0}, {unix.SYS_SETGID, uintptr(j.gid)}, {unix.SYS_SETUID, uintptr(j.uid)}} {
		if _, _, errno := unix.RawSyscall(call[0], call[1], 0, 0); errno != 0 {
			return fmt.Errorf("failed to exec into Firecracker: %w", errno)
		}
	}
	args := append([]string{program, "--id", j.id, "--start-time-us", "1", "--start-time-cpu-us", "1", "--parent-cpu-time-us", "1"}, j.rest...)
	return fmt.Errorf("failed to exec into Firecracker: %w", syscall.Exec(program, args, nil))
}
