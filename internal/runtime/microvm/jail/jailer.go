package jail

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Jailer is Firecracker's own, which copies the monitor into the directory
// Root/<its name>/ID/root, makes devices there and that directory its root, becomes
// the user and then the monitor. It is the same process from the beginning to the end,
// and in its cgroup, process and network namespaces before it begins, so the jailer is
// asked for none of these: it knows only one version of cgroups at a time, and would
// fork for the namespace.
type Jailer struct {
	Path string // of the program
	ID   string // that it calls the machine
}

// prepareJailer mounts what the jailer is to find in the directory that it makes the
// root of. All is on a file system in memory that is seen by this thread and by what
// it starts, so nothing of it is left on the host when the monitor ends.
func (c *Config) prepareJailer() (*exec.Cmd, error) {
	program, err := c.program()
	if err != nil {
		return nil, err
	}
	if err := c.buildBase(program); err != nil {
		return nil, fmt.Errorf("build directory for the jailer: %w", err)
	}
	// What it needs to make the jail and to become the user. The monitor can never
	// have them: it is that user, and gains nothing by executing anything.
	if err := keepCapabilities(unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_MKNOD,
		unix.CAP_SETGID, unix.CAP_SETUID, unix.CAP_SYS_ADMIN, unix.CAP_SYS_CHROOT, unix.CAP_SYS_RESOURCE); err != nil {
		return nil, err
	}
	user := strconv.FormatUint(uint64(c.UID), 10)
	args := []string{
		filepath.Base(c.Jailer.Path), "--id", c.Jailer.ID, "--exec-file", program, "--uid", user, "--gid", user,
		"--chroot-base-dir", c.Root, "--netns", c.NetNS, "--resource-limit", "no-file=" + strconv.Itoa(maxOpen),
	}
	if c.MaxFile != 0 {
		args = append(args, "--resource-limit", "fsize="+strconv.FormatInt(c.MaxFile, 10))
	}
	return &exec.Cmd{
		Path: c.Jailer.Path, Args: append(append(args, "--"), c.Args...),
		Env: []string{}, Dir: "/", SysProcAttr: &syscall.SysProcAttr{},
	}, nil
}

// program is where the monitor is on the host.
func (c *Config) program() (string, error) {
	for _, m := range c.Mounts {
		if m.To == c.Program {
			return filepath.EvalSymlinks(m.From) // by which the jailer names directories
		}
	}
	return "", fmt.Errorf("%s is not in the jail", c.Program)
}

func (c *Config) buildBase(program string) error {
	info, err := os.Stat(program)
	if err != nil {
		return err
	}
	// Room for the copy of the program. The monitor may write there too.
	if err := unix.Mount("jail", c.Root, "tmpfs", unix.MS_NOSUID, fmt.Sprintf("size=%d,nr_inodes=1k,mode=0755", info.Size()+1<<20)); err != nil {
		return fmt.Errorf("mount it: %w", err)
	}
	root := filepath.Join(c.Root, filepath.Base(program), c.Jailer.ID, "root")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	for _, m := range c.Mounts {
		if m.To == c.Program {
			continue
		}
		if err := bind(m, root); err != nil {
			return fmt.Errorf("mount %s: %w", m.From, err)
		}
	}
	return nil
}
