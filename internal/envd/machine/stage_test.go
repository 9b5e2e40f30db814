package machine

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// stageEnv makes the test binary set the stage in namespaces of its own, and then
// become what is tested there.
const stageEnv = "MACHINE_TEST_STAGE"

// Descriptors that a stage inherits.
const (
	goFD    = 3 // gives a byte when the outside is ready
	agentFD = 4 // the agent's binary
	guestFD = 5 // the test guest's
)

func TestMain(m *testing.M) {
	var err error
	switch os.Getenv(stageEnv) {
	case "":
		code := m.Run()
		os.RemoveAll(built)
		os.Exit(code)
	case "vm":
		err = stageVM()
	case "mounts":
		err = stageMounts()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "stage:", err)
		os.Exit(1)
	}
}

// stageVM makes what a machine's disk holds and becomes its first process.
func stageVM() error {
	if _, err := io.ReadFull(os.NewFile(goFD, "go"), make([]byte, 1)); err != nil {
		return err
	}
	const root = "/tmp"
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount root: %w", err)
	}
	for _, dir := range []string{"etc/ssl/certs", "out", "dev", "proc", "root", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\n", "etc/group": "root:x:0:\ntty:x:5:\n",
		"etc/hosts": "10.1.2.3 mine # kept\n127.0.0.1 localhost\n", "etc/hostname": "image\n",
		"etc/ssl/certs/ca-certificates.crt": "the image's\n",
	} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := os.Symlink("../run/systemd/resolve/stub-resolv.conf", filepath.Join(root, "etc/resolv.conf")); err != nil {
		return err
	}
	if err := copyFD(agentFD, filepath.Join(root, "envd")); err != nil {
		return err
	}
	if err := copyFD(guestFD, filepath.Join(root, "testguest")); err != nil {
		return err
	}
	// Devices cannot be made here: they are shown those of the host.
	if err := unix.Mount("tmpfs", root+"/dev", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount devices: %w", err)
	}
	for _, name := range []string{"null", "zero", "urandom", "tty"} {
		if err := bind("/dev/"+name, filepath.Join(root, "dev", name)); err != nil {
			return err
		}
	}
	if err := unix.Mount(os.Getenv("MACHINE_TEST_OUT"), root+"/out", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("show the directory outside: %w", err)
	}
	if line := os.Getenv("MACHINE_TEST_CMDLINE"); line != "" {
		if err := unix.Mount("proc", root+"/proc", "proc", 0, ""); err != nil {
			return fmt.Errorf("mount proc: %w", err)
		}
		if err := os.WriteFile(root+"/cmdline", []byte(line), 0o644); err != nil {
			return err
		}
		if err := bind(root+"/cmdline", root+"/proc/cmdline"); err != nil {
			return err
		}
	}
	if err := unix.Chroot(root); err != nil {
		return err
	}
	args := append([]string{"/envd", "-vm"}, strings.Fields(os.Getenv("MACHINE_TEST_ARGS"))...)
	return unix.Exec("/envd", args, []string{"HOME=/", "TERM=linux", "BOOT_IMAGE=/vmlinuz", "LD_PRELOAD=x"})
}

func copyFD(fd uintptr, to string) error {
	f, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, os.NewFile(fd, "from")); err != nil {
		return err
	}
	return f.Close()
}

func bind(from, to string) error {
	if f, err := os.OpenFile(to, os.O_CREATE, 0o644); err == nil {
		f.Close()
	}
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("show %s: %w", to, err)
	}
	return nil
}

// stageMounts mounts everything twice below a directory and shows what is there
// after each time.
func stageMounts() error {
	const root = "/tmp"
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for range 2 {
		for _, err := range mountAll(root) {
			fmt.Println("problem:", err)
		}
		f, err := os.Open("/proc/self/mountinfo")
		if err != nil {
			return err
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if left, right, _ := strings.Cut(lines.Text(), " - "); strings.HasPrefix(strings.Fields(left)[4], root) {
				fmt.Println(strings.Fields(left)[4], strings.Fields(right)[0])
			}
		}
		fmt.Println("--")
	}
	if fi, err := os.Stat(root + "/dev/null"); err != nil || fi.Mode()&os.ModeCharDevice == 0 {
		fmt.Println("problem: /dev/null is", fi, err)
	}
	if fi, err := os.Stat(root + "/tmp"); err != nil || fi.Mode() != os.ModeDir|os.ModeSticky|0o777 {
		fmt.Println("problem: /tmp is", fi.Mode(), err)
	}
	return nil
}
