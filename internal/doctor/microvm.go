package doctor

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/kvm"
)

// What only virtual machines need is never more than a warning: without it
// sandboxes run in gVisor.

// kvm says whether this process can ask the kernel for a virtual machine. That one
// of them can boot Linux is another matter, which the runtime's probe finds out.
func (h host) kvm() Result {
	const name = "virtualisation"
	const (
		getVersion = 0xae00 // KVM_GET_API_VERSION
		version    = 12
	)
	f, err := os.OpenFile(h.path("dev/kvm"), os.O_RDWR, 0)
	if err != nil {
		return warn(name, "for fast virtual machines: a host with hardware virtualisation, switched on in its firmware or by its provider",
			"/dev/kvm cannot be opened (%v): virtual machines run by software emulation only", errors.Unwrap(err))
	}
	defer f.Close()
	if got, err := unix.IoctlRetInt(int(f.Fd()), getVersion); err != nil || got != version {
		return warn(name, "load the host's own KVM module", "/dev/kvm does not answer as KVM does (%d, %v)", got, err)
	}
	return ok(name, "/dev/kvm answers; whether it boots Linux is another matter")
}

// monitors says which programs there are that run virtual machines.
func monitors() Result {
	const name = "machine monitor"
	firecracker, ferr := exec.LookPath("firecracker")
	qemu, qerr := exec.LookPath("qemu-system-x86_64")
	switch {
	case ferr != nil && qerr != nil:
		return warn(name, "for virtual machines: install firecracker, or apt-get install qemu-system-x86",
			"neither firecracker nor qemu-system-x86_64 is installed: sandboxes run in gVisor only")
	case ferr != nil:
		return ok(name, "%s", qemu)
	case qerr != nil:
		return ok(name, "%s", firecracker)
	}
	return ok(name, "%s, %s", firecracker, qemu)
}

// tap says whether network links of virtual machines can be made.
func (h host) tap() Result {
	const name = "tap"
	f, err := os.OpenFile(h.path("dev/net/tun"), os.O_RDWR, 0)
	if err != nil {
		return warn(name, "for virtual machines: modprobe tun", "/dev/net/tun cannot be opened: %v", errors.Unwrap(err))
	}
	f.Close()
	return ok(name, "/dev/net/tun opens")
}

// guestKernel says whether there is a kernel for virtual machines to boot.
func guestKernel(dir string) Result {
	const name = "guest kernel"
	at, err := filepath.EvalSymlinks(filepath.Join(dir, "kernels", "current"))
	if err != nil {
		return warn(name, "for virtual machines: wrenn kernel install", "none is installed")
	}
	return ok(name, "%s", filepath.Base(at))
}

// linuxInKVM says what came of booting the guest's kernel, when that was tried: where
// it cannot, sandboxes run in gVisor unless the operator wants emulated machines.
func linuxInKVM(dir string) Result {
	const name = "linux in kvm"
	for _, file := range []string{kvm.FirecrackerVerdict, kvm.QEMUVerdict} {
		switch v, err := kvm.Read(filepath.Join(dir, file)); {
		case err != nil:
		case v.Refusal == "":
			return ok(name, "%s boots the guest kernel", v.Monitor)
		default:
			return warn(name, "for fast virtual machines: a host whose KVM boots Linux", "%s does not boot the guest kernel: %s", v.Monitor, v.Refusal)
		}
	}
	return ok(name, "not tried yet: `wrenn up --runtime firecracker` or qemu does")
}

// reflinks says whether files of the data directory can share blocks.
func reflinks(dir string) Result {
	const name = "reflinks"
	at := nearest(filepath.Join(dir, "agent")) // which may be a file system of its own
	err := tryReflink(at)
	if err == nil {
		return ok(name, "files at %s share their blocks", at)
	}
	const remedy = "for the fastest disks of virtual machines: a data directory on XFS or Btrfs"
	if _, err := exec.LookPath("mkfs.xfs"); err != nil {
		return warn(name, "for virtual machines: apt-get install xfsprogs, or a data directory on XFS or Btrfs",
			"the file system at %s has none, and mkfs.xfs is missing to make one that has", at)
	}
	return warn(name, remedy, "the file system at %s has none: virtual machines get one in a file, which costs some speed", at)
}

// diskFile says whether the file system in a file, which virtual machines have their
// disks on, can become as large as it says it is: else what they write may be lost.
func diskFile(dir string) Result {
	const name = "disks in a file"
	path := filepath.Join(dir, "disks.xfs")
	var file unix.Stat_t
	if err := unix.Stat(path, &file); errors.Is(err, unix.ENOENT) {
		return ok(name, "there is none")
	} else if err != nil {
		return warn(name, "make it readable", "cannot look at %s: %v", path, err)
	}
	var host unix.Statfs_t
	if err := unix.Statfs(path, &host); err != nil {
		return warn(name, "make it readable", "cannot look at the file system of %s: %v", path, err)
	}
	grows, free := max(file.Size-file.Blocks*512, 0)>>20, int64(host.Bavail)*host.Bsize>>20
	if free < grows {
		return warn(name, "free some space on the host's disk, or use a data directory on XFS or Btrfs",
			"%s may grow by %d MiB and the host's disk has %d MiB free: when that is full, virtual machines lose what they write", path, grows, free)
	}
	return ok(name, "%s may grow by %d MiB; the host's disk has %d MiB free", path, grows, free)
}

// tryReflink lets one file without a name share a block of another.
func tryReflink(dir string) error {
	var files [2]*os.File
	for i := range files {
		fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		files[i] = os.NewFile(uintptr(fd), dir)
		defer files[i].Close()
	}
	if _, err := files[0].Write(make([]byte, 4096)); err != nil {
		return err
	}
	return unix.IoctlFileClone(int(files[1].Fd()), int(files[0].Fd()))
}

// nearest is the directory nearest to dir, upwards, that exists.
func nearest(dir string) string {
	for at := filepath.Clean(dir); ; at = filepath.Dir(at) {
		if fi, err := os.Stat(at); err == nil && fi.IsDir() || at == filepath.Dir(at) {
			return at
		}
	}
}
