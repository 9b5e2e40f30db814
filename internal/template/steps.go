package template

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// buildFunc makes the root filesystem of r in dir/rootfs and writes what the
// programs that it runs print to the file logPath.
type buildFunc func(ctx context.Context, r recipe, dir, logPath string, p *progress) error

// build makes a root filesystem from the distribution's packages.
func build(ctx context.Context, r recipe, dir, logPath string, p *progress) error {
	if os.Geteuid() != 0 {
		return errors.New("only root can build it: it makes a whole system with users of its own")
	}
	debootstrap, err := exec.LookPath("debootstrap")
	if err != nil {
		return errors.New("debootstrap is missing: apt-get install debootstrap")
	}
	log, err := os.Create(logPath)
	if err != nil {
		return err
	}
	defer log.Close()
	root := filepath.Join(dir, rootfsName)

	// debootstrap takes no path with a space in it, so it gets one by way of a descriptor.
	at, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer at.Close()
	target := fmt.Sprintf("/proc/%d/fd/%d/%s", os.Getpid(), at.Fd(), rootfsName)

	p.begin("bootstrapping the distribution's minimal system")
	bootstrap := &exec.Cmd{
		Path:        debootstrap,
		Args:        []string{"debootstrap", "--variant=minbase", "--force-check-gpg", "--arch=" + r.Arch, r.Suite, target},
		Env:         stepEnv(),
		SysProcAttr: &syscall.SysProcAttr{},
	}
	if err := runStep(ctx, bootstrap, log, p.debootstrapLine, nil); err != nil {
		return fmt.Errorf("debootstrap: %w (its output: %s)", err, logPath)
	}
	// No time of the build may end up in the image; the archive's release date
	// stands in, for it is the same for everyone who builds from that archive.
	epoch, err := releaseDate(root)
	if err != nil {
		return err
	}

	p.begin("installing packages")
	if err := r.install(root); err != nil {
		return err
	}
	if err := copyResolver(root); err != nil {
		return err
	}
	setup := &exec.Cmd{
		Path: "/bin/sh",
		Args: []string{"sh", "-c", r.Setup},
		Env: append(stepEnv(),
			"PACKAGES="+strings.Join(r.Packages, " "),
			"SOURCE_DATE_EPOCH="+strconv.FormatInt(epoch.Unix(), 10),
			"PYTHONHASHSEED=0", // else the order of sets gets into compiled modules
		),
		Dir:         "/",
		SysProcAttr: &syscall.SysProcAttr{Chroot: root},
	}
	if err := runStep(ctx, setup, log, nil, p.aptLine); err != nil {
		return fmt.Errorf("install packages: %w (the whole output: %s)", err, logPath)
	}

	p.begin("making it reproducible")
	if err := normalise(ctx, root, epoch); err != nil {
		return err
	}
	p.end()
	return nil
}

// runStep runs cmd in mount and process namespaces of its own: when this process
// or the step's first process dies, by whatever hand, the kernel ends everything
// that the step started and undoes its mounts. Every line of output goes to log,
// and to output unless that is nil; the last ones are in the error. What cmd
// writes to its file descriptor 3 goes to status, line by line; nil: it has none.
func runStep(ctx context.Context, cmd *exec.Cmd, log io.Writer, output, status func(string)) error {
	cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWPID
	cmd.SysProcAttr.Unshareflags |= syscall.CLONE_NEWNS // unlike Cloneflags, also makes all mounts private
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	// Pdeathsig is sent when the thread that started the child ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	cmd.Stderr = cmd.Stdout
	var statusDone chan struct{}
	if status != nil {
		// Not the pipe of the output: apt makes its end of this one non-blocking,
		// and programs that share it then fail when it is full.
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		defer r.Close()
		defer w.Close()
		cmd.ExtraFiles = []*os.File{w}
		if err := cmd.Start(); err != nil {
			return err
		}
		w.Close()
		statusDone = make(chan struct{})
		go func() { defer close(statusDone); eachLine(r, status) }()
	} else if err := cmd.Start(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()

	var tail []string
	eachLine(out, func(text string) {
		fmt.Fprintln(log, text)
		if output != nil {
			output(text)
		}
		tail = append(tail[max(0, len(tail)-9):], text)
	})
	err = cmd.Wait()
	if statusDone != nil {
		<-statusDone
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("%w; it said last:\n  %s", err, strings.Join(tail, "\n  "))
	}
	return nil
}

// eachLine calls do with each line of r until r ends.
func eachLine(r io.Reader, do func(string)) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		do(lines.Text())
	}
	_, _ = io.Copy(io.Discard, r) // after a line beyond the buffer: the writer must not block
}

// stepEnv is the environment of the build's steps: fixed, but for the proxies
// that the operator set for getting packages.
func stepEnv() []string {
	env := []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root", "LC_ALL=C.UTF-8", "TZ=UTC", "DEBIAN_FRONTEND=noninteractive",
	}
	for _, name := range []string{"http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// copyResolver lets the steps resolve names as the host does. The setup script
// empties the file at its end.
func copyResolver(root string) error {
	conf, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		return fmt.Errorf("read the host's resolver: %w", err)
	}
	return os.WriteFile(filepath.Join(root, "etc/resolv.conf"), conf, 0o644)
}

// releaseDate is when the archive that root was bootstrapped from was released.
func releaseDate(root string) (time.Time, error) {
	for _, pattern := range []string{"*_InRelease", "*_Release"} {
		files, err := filepath.Glob(filepath.Join(root, "var/lib/apt/lists", pattern))
		if err != nil {
			return time.Time{}, err
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				return time.Time{}, err
			}
			for line := range bytes.Lines(data) {
				if date, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "Date: "); ok {
					return time.Parse(time.RFC1123, date)
				}
			}
		}
	}
	return time.Time{}, errors.New("find the archive's release date: debootstrap left no Release file")
}
