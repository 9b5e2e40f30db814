package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/envd/user"
)

// defaultPath is the search path when the agent has none itself.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// command is a program to start.
type command struct {
	path  string
	argv0 string   // what the program sees as its name
	args  []string // without the program itself
	env   []string
	dir   string
	user  user.User
	size  *Size // of its terminal; nil without one
	stdin bool  // without a terminal: a pipe, else /dev/null
}

// environment puts together a process's variables; later maps win.
func environment(u user.User, layers ...map[string]string) []string {
	path := os.Getenv("PATH")
	if path == "" {
		path = defaultPath
	}
	all := map[string]string{"PATH": path, "HOME": u.Home, "USER": u.Name, "LOGNAME": u.Name}
	for _, layer := range layers {
		for name, value := range layer {
			all[name] = value
		}
	}
	env := make([]string, 0, len(all))
	for name, value := range all {
		env = append(env, name+"="+value)
	}
	slices.Sort(env)
	return env
}

// lookPath finds a program as execvp would, by the process's own PATH.
func lookPath(name, dir string, env []string) (string, error) {
	if name == "" {
		return "", errors.New("no command given")
	}
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, variable := range env {
		list, ok := strings.CutPrefix(variable, "PATH=")
		if !ok {
			continue
		}
		for _, entry := range filepath.SplitList(list) {
			path := filepath.Join(entry, name)
			if !filepath.IsAbs(path) {
				path = filepath.Join(dir, path)
			}
			if info, err := os.Stat(path); err == nil && !info.IsDir() && info.Mode()&0o111 != 0 {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("command %q not found in PATH", name)
}

// checkDir returns an error fit for the user unless dir is a directory.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("cwd '%s' does not exist", dir)
	case err != nil:
		return fmt.Errorf("check cwd: %w", err)
	case !info.IsDir():
		return fmt.Errorf("cwd '%s' is not a directory", dir)
	}
	return nil
}

// spawn starts the command. The caller runs supervise with the channel.
func spawn(r *Reaper, c command) (*Process, <-chan syscall.WaitStatus, error) {
	p := &Process{reaper: r, out: newOutput(), activity: make(chan struct{}, 1), done: make(chan struct{})}
	// Without a terminal a process group is enough. Linux makes a scheduling group
	// of every session, which on a busy machine costs a short command milliseconds.
	attr := &syscall.ProcAttr{Dir: c.dir, Env: c.env, Sys: &syscall.SysProcAttr{Setpgid: c.size == nil}}
	attr.Sys.Setsid, attr.Sys.Setctty = c.size != nil, c.size != nil
	if os.Getuid() == 0 {
		attr.Sys.Credential = &syscall.Credential{Uid: c.user.UID, Gid: c.user.GID, Groups: c.user.Groups}
	}
	connect := p.pipes
	if c.size != nil {
		connect = p.openTerminal
	}
	theirs, ours, err := connect(c)
	defer closeFDs(theirs)
	if err != nil {
		closeAll(ours)
		return nil, nil, err
	}
	for i := range 3 {
		attr.Files = append(attr.Files, uintptr(theirs[min(i, len(theirs)-1)]))
	}
	p.child, err = r.start(c.path, append([]string{c.argv0}, c.args...), attr)
	if err != nil {
		closeAll(ours)
		return nil, nil, err
	}
	p.pid = p.child.pid
	return p, p.child.exited, nil
}

// openTerminal connects all three to a terminal.
func (p *Process) openTerminal(c command) (theirs []int, ours []*os.File, err error) {
	master, slave, err := openTerminal(c.user.UID, *c.size)
	if err != nil {
		return nil, nil, err
	}
	p.terminal, p.in = master, newInput(master)
	p.streams = []*stream{{kind: terminal, file: master}}
	return []int{slave}, []*os.File{master}, nil
}

// pipes connects stdin, stdout and stderr. What it returns is to be closed even
// when it fails. The process's ends never pass through an os.File, which would
// make them non-blocking and back.
func (p *Process) pipes(c command) (theirs []int, ours []*os.File, err error) {
	if c.stdin {
		read, write, err := pipe()
		if err != nil {
			return theirs, ours, fmt.Errorf("make stdin: %w", err)
		}
		in := ourEnd(write, "stdin")
		theirs, ours = append(theirs, read), append(ours, in)
		p.in = newInput(in)
	} else {
		null, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return theirs, ours, fmt.Errorf("open %s: %w", os.DevNull, err)
		}
		theirs = append(theirs, null)
	}
	for _, k := range []kind{stdout, stderr} {
		read, write, err := pipe()
		if err != nil {
			return theirs, ours, fmt.Errorf("make output pipe: %w", err)
		}
		out := ourEnd(read, "output")
		theirs, ours = append(theirs, write), append(ours, out)
		if c.user.UID != 0 {
			// So that the user's programs can open /dev/stdout and /dev/stderr.
			_ = unix.Fchown(write, int(c.user.UID), int(c.user.GID))
		}
		p.streams = append(p.streams, &stream{kind: k, file: out})
	}
	return theirs, ours, nil
}

func pipe() (read, write int, err error) {
	var fds [2]int
	err = unix.Pipe2(fds[:], unix.O_CLOEXEC)
	return fds[0], fds[1], err
}

// ourEnd makes one end of a pipe a file whose reads and writes can be interrupted
// and hold no thread. The other end still blocks, as programs expect.
func ourEnd(fd int, name string) *os.File {
	_ = unix.SetNonblock(fd, true)
	return os.NewFile(uintptr(fd), name)
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
