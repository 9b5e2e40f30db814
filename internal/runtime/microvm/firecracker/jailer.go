package firecracker

import (
	"context"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/runtime/microvm"
	"github.com/wrenn/wrenn/internal/runtime/microvm/jail"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// NoJailer as Config.Jailer says that Firecracker's jailer is not to be used.
const NoJailer = "none"

// findJailer finds the jailer that belongs to a Firecracker of this version. without
// says why there is none.
func findJailer(ctx context.Context, cfg Config, v Version) (path, without string, err error) {
	switch cfg.Jailer {
	case NoJailer:
		return "", "Firecracker's jailer is not to be used", nil
	case "":
	default:
		if path, err = filepath.Abs(cfg.Jailer); err != nil {
			return "", "", err
		}
		if err := checkJailer(ctx, path, v); err != nil {
			return "", "", &sandbox.Error{Kind: sandbox.ErrUnavailable, Message: "Firecracker's jailer cannot be used", Cause: err}
		}
		return path, "", nil
	}
	for _, path := range jailersOf(cfg.Binary) {
		if _, serr := os.Stat(path); serr != nil {
			continue
		}
		if err := checkJailer(ctx, path, v); err != nil {
			return "", err.Error(), nil
		}
		return path, "", nil
	}
	return "", "Firecracker's jailer is neither beside it nor in PATH", nil
}

// jailersOf are the places where the jailer of a Firecracker may be. Both may have
// the version and the processor in their names, as they are released.
func jailersOf(binary string) []string {
	var paths []string
	for _, b := range []string{binary, resolved(binary)} {
		dir, name := filepath.Split(b)
		if rest, ok := strings.CutPrefix(name, "firecracker"); ok && rest != "" {
			paths = append(paths, filepath.Join(dir, "jailer"+rest))
		}
		paths = append(paths, filepath.Join(dir, "jailer"))
	}
	if path, err := exec.LookPath("jailer"); err == nil {
		paths = append(paths, path)
	}
	return paths
}

func resolved(path string) string {
	if to, err := filepath.EvalSymlinks(path); err == nil {
		return to
	}
	return path
}

// checkJailer refuses a jailer that is not of the version: it starts Firecracker with
// words that another one may not know.
func checkJailer(ctx context.Context, path string, v Version) error {
	got, err := ProgramVersion(ctx, path)
	if err != nil {
		return err
	}
	if got != v {
		return fmt.Errorf("%s is of version %s, and Firecracker of %s", path, got, v)
	}
	return nil
}

// Confinement says in words what confines the machines.
func (f *Monitor) Confinement() string {
	if f.jailer != "" {
		return "Firecracker's jailer " + f.jailer
	}
	return "Wrenn itself (" + f.without + ")"
}

// jailOf is the jail of a machine. Its paths are the same whoever makes it, so that an
// image does not depend on that.
func (f *Monitor) jailOf(m microvm.Machine, out *os.File) (jail.Config, error) {
	binary, err := filepath.EvalSymlinks(f.cfg.Binary)
	if err != nil {
		return jail.Config{}, err
	}
	info, err := os.Stat(m.Disk())
	if err != nil {
		return jail.Config{}, err
	}
	program := "/" + filepath.Base(binary)
	c := jail.Config{
		Root: m.Jail(), Program: program, Args: []string{"--api-sock", runDir + "/" + socketName},
		Mounts: []jail.Mount{
			{From: binary, To: program},
			{From: m.Run(), To: runDir, Writable: true},
			{From: m.Disk(), To: rootPath, Writable: true},
			{From: m.Agent, To: agentPath},
			{From: m.Kernel, To: kernelPath},
			{From: m.Initramfs, To: initrdPath},
		},
		Devices: []jail.Device{{Path: "/dev/kvm"}, {Path: "/dev/net/tun"}, {Path: "/dev/userfaultfd"}},
		Dir:     runDir, UID: m.UID, NetNS: m.NetNS, Cgroups: m.Cgroups, Group: m.Group, Stdout: out, Proc: true,
		MaxFile: max(info.Size(), m.MemoryMiB<<20),
		Inside:  func(*jail.Config) error { return giveTAP(m.TAP, m.UID) },
	}
	dynamic, err := needsLibraries(binary)
	if err != nil {
		return c, err
	}
	if dynamic {
		c.Mounts = append(c.Mounts, jail.System...)
	}
	if f.jailer != "" {
		c.Jailer = &jail.Jailer{Path: f.jailer, ID: string(m.ID)}
		return c, nil
	}
	c.Args = append([]string{"--id", string(m.ID)}, c.Args...) // which the jailer adds
	return c, nil
}

// needsLibraries reports whether a program is linked dynamically: those of a release
// are not, one that somebody has built may be.
func needsLibraries(path string) (bool, error) {
	f, err := elf.Open(path)
	if err != nil {
		return false, fmt.Errorf("read program: %w", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return true, nil
		}
	}
	return false, nil
}

// giveTAP lets the user open the link. The thread is in the slot's network namespace.
func giveTAP(name string, uid uint32) error {
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open tap: %w", err)
	}
	defer tun.Close()
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(int(tun.Fd()), unix.TUNSETIFF, req); err != nil {
		return fmt.Errorf("open tap %s: %w", name, err)
	}
	if err := unix.IoctlSetInt(int(tun.Fd()), unix.TUNSETOWNER, int(uid)); err != nil {
		return fmt.Errorf("give tap %s to user %d: %w", name, uid, err)
	}
	return nil
}
