// Command guestboot is the first program of a virtual machine: /init of its
// initramfs. It loads the kernel's modules, mounts the machine's disks and hands
// over to the guest agent.
//
//	/dev/vda  ext4, the sandbox's root filesystem; grown to the size of its device
//	/dev/vdb  ext4, read-only, holds the file envd: the guest agent of this host
//
// It is small on purpose: a machine waits for every page of it.
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	moduleList = "/modules/list" // names of files beside it, in the order to load them
	rootDisk   = "/dev/vda"
	agentDisk  = "/dev/vdb"
	newRoot    = "/root"
	agentMount = "/agent"
	agentPath  = "/usr/bin/envd"

	// How long the disks may take to come up. On an emulated machine of a busy
	// host that can be seconds; without them there is nothing to boot.
	diskLimit = 30 * time.Second
)

// A machine that is only to show that it boots Linux is given this word and no disk,
// and ends with this answer on its console.
const (
	probeWord   = "probe"
	probeAnswer = "it was only tried"
)

func main() {
	err := boot()
	fmt.Fprintln(os.Stderr, "guestboot: the machine cannot start:", err)
	// The monitor ends with the machine. Were this process to exit, the kernel would
	// panic, and say much that nobody needs.
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

// boot returns only when it fails.
func boot() error {
	words, err := mountKernel()
	if err != nil {
		return err
	}
	if len(words) == 1 && words[0] == probeWord {
		return errors.New(probeAnswer)
	}
	if err := loadModules(); err != nil {
		return err
	}
	if err := mountDisk(rootDisk, newRoot, unix.MS_NOATIME, rootOptions); err != nil {
		return err
	}
	if err := grow(newRoot, rootDisk); err != nil {
		return err
	}
	if err := mountAgent(); err != nil {
		return err
	}
	if err := switchRoot(); err != nil {
		return err
	}
	argv := append([]string{agentPath, "-vm"}, words...)
	return fmt.Errorf("start the guest agent: %w", unix.Exec(agentPath, argv, os.Environ()))
}

// Inode tables that the host left unwritten may stay so: the checksums of the
// groups say what is in use, and writing them would fill the sandbox's disk with
// zeroes, in the first minutes of every machine.
const rootOptions = "noinit_itable"

// mountKernel mounts what the kernel provides and returns the words after " -- "
// of its command line. Those that it hands to its first process are not the same:
// there are options among them that it did not know.
func mountKernel() ([]string, error) {
	for _, dir := range []string{"/dev", "/proc", newRoot, agentMount} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	if err := unix.Mount("devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, ""); err != nil {
		return nil, fmt.Errorf("mount /dev: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return nil, fmt.Errorf("mount /proc: %w", err)
	}
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	if err := unix.Unmount("/proc", 0); err != nil {
		return nil, fmt.Errorf("unmount /proc: %w", err)
	}
	_, after, _ := strings.Cut(strings.TrimSpace(string(line))+" ", " -- ")
	words := strings.Fields(after)
	if len(words) > 0 && words[0] == "-vm" {
		words = words[1:]
	}
	return words, nil
}

// loadModules loads the modules of the initramfs, which come before what needs
// them in the list. One that the kernel has already is no matter, nor one that finds
// nothing to drive.
func loadModules() error {
	list, err := os.ReadFile(moduleList)
	if errors.Is(err, os.ErrNotExist) {
		return nil // a kernel with everything built in
	}
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(list)) {
		f, err := os.Open("/modules/" + name)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	return nil
}

// mountDisk mounts the ext4 file system on device at dir.
func mountDisk(device, dir string, flags uintptr, options string) error {
	if err := awaitDisk(device); err != nil {
		return err
	}
	if err := unix.Mount(device, dir, "ext4", flags, options); err != nil {
		return fmt.Errorf("mount %s: %w", device, err)
	}
	return nil
}

// awaitDisk waits until the kernel has found the disk. Drivers mostly have when
// their module is loaded.
func awaitDisk(device string) error {
	if _, err := os.Stat(device); err == nil {
		return nil
	}
	events, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fmt.Errorf("listen for devices: %w", err)
	}
	defer unix.Close(events)
	if err := unix.Bind(events, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return fmt.Errorf("listen for devices: %w", err)
	}
	buf := make([]byte, 8192)
	for deadline := time.Now().Add(diskLimit); ; {
		if _, err := os.Stat(device); err == nil {
			return nil
		}
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("there is no disk %s: the machine was given none, or the kernel has no driver for it", device)
		}
		tv := unix.NsecToTimeval(left.Nanoseconds())
		if err := unix.SetsockoptTimeval(events, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return fmt.Errorf("listen for devices: %w", err)
		}
		// A timeout or an overrun is no matter: the device is looked for again.
		_, _, _ = unix.Recvfrom(events, buf, 0)
	}
}

// resizeFS is EXT4_IOC_RESIZE_FS, _IOW('f', 16, __u64).
const resizeFS = 0x40086610

// grow makes the mounted file system as large as its device: the template's image
// has no room to spare, and every sandbox a disk of its own size.
func grow(dir, device string) error {
	d, err := os.Open(device)
	if err != nil {
		return err
	}
	defer d.Close()
	size, err := d.Seek(0, 2)
	if err != nil {
		return fmt.Errorf("measure %s: %w", device, err)
	}
	root, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(root.Fd()), &st); err != nil {
		return fmt.Errorf("measure the file system of %s: %w", device, err)
	}
	blocks := uint64(size) / uint64(st.Bsize)
	// On one that has had an error, which the kernel notes in it, the call is refused;
	// it has grown before that.
	if has, err := blocksOf(d); err == nil && has >= blocks {
		return nil
	}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, root.Fd(), resizeFS, uintptr(unsafe.Pointer(&blocks)))
	if errno != 0 {
		return fmt.Errorf("grow the file system of %s to %d blocks: %w", device, blocks, errno)
	}
	return nil
}

// blocksOf reads how many blocks the file system on a device has: s_blocks_count_lo of
// its superblock (kernel documentation, "ext4 Data Structures and Algorithms"), which
// is all of it below 16 TiB.
func blocksOf(device *os.File) (uint64, error) {
	b := make([]byte, 4)
	if _, err := device.ReadAt(b, 1024+4); err != nil {
		return 0, err
	}
	return uint64(binary.LittleEndian.Uint32(b)), nil
}

// mountAgent puts the host's guest agent where the root filesystem has its own,
// which is that of another day, or an empty file.
func mountAgent() error {
	if err := mountDisk(agentDisk, agentMount, unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, ""); err != nil {
		return err
	}
	target := newRoot + agentPath
	err := unix.Mount(agentMount+"/envd", target, "", unix.MS_BIND, "")
	if errors.Is(err, unix.ENOENT) {
		var f *os.File
		if f, err = os.OpenFile(target, os.O_CREATE|os.O_WRONLY, 0o755); err == nil {
			f.Close()
			err = unix.Mount(agentMount+"/envd", target, "", unix.MS_BIND, "")
		}
	}
	if err != nil {
		return fmt.Errorf("mount the guest agent at %s: %w", agentPath, err)
	}
	if err := unix.Unmount(agentMount, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", agentDisk, err)
	}
	return nil
}

// switchRoot makes newRoot the root and frees the memory of the initramfs.
func switchRoot() error {
	for _, path := range []string{"/modules", "/init"} {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("free the initramfs: %w", err)
		}
	}
	// Without /dev in the root, the agent makes and mounts its own.
	if err := unix.Mount("/dev", newRoot+"/dev", "", unix.MS_MOVE, ""); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("move /dev: %w", err)
	}
	if err := unix.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	return os.Chdir("/")
}
