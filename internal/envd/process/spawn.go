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
	attr := &syscall.ProcAttr{Dir: c.dir, Env: c.env, Sys: &syscall.SysProcAttr{}}
	if os.Getuid() == 0 {
		attr.Sys.Credential = &syscall.Credential{Uid: c.user.UID, Gid: c.user.GID, Groups: c.user.Groups}
	}
	connect := p.pipes
	if c.size != nil {
		connect = p.openTerminal
	}
	theirs, ours, err := connect(c)
	defer closeAll(theirs)
	if err != nil {
		closeAll(ours)
		return nil, nil, err
	}
	for _, f := range theirs {
		attr.Files = append(attr.Files, f.Fd())
	}
	if c.size != nil {
		attr.Files = []uintptr{attr.Files[0], attr.Files[0], attr.Files[0]}
		attr.Sys.Setsid, attr.Sys.Setctty = true, true
	} else {
		attr.Sys.Setpgid = true
	}
	pid, exited, err := r.start(c.path, append([]string{c.argv0}, c.args...), attr)
	if err != nil {
		closeAll(ours)
		return nil, nil, err
	}
	p.pid = pid
	return p, exited, nil
}

func (p *Process) openTerminal(c command) (theirs, ours []*os.File, err error) {
	master, slave, err := openTerminal(c.user.UID, *c.size)
	if err != nil {
		return nil, nil, err
	}
	p.terminal, p.in = master, newInput(master)
	p.streams = []*stream{{kind: terminal, file: master}}
	return []*os.File{slave}, []*os.File{master}, nil
}

// pipes connects stdin, stdout and stderr. What it returns is to be closed even
// when it fails.
func (p *Process) pipes(c command) (theirs, ours []*os.File, err error) {
	if c.stdin {
		read, write, err := os.Pipe()
		if err != nil {
			return theirs, ours, fmt.Errorf("make stdin: %w", err)
		}
		theirs, ours = append(theirs, read), append(ours, write)
		p.in = newInput(write)
	} else {
		null, err := os.Open(os.DevNull)
		if err != nil {
			return theirs, ours, err
		}
		theirs = append(theirs, null)
	}
	for _, k := range []kind{stdout, stderr} {
		read, write, err := os.Pipe()
		if err != nil {
			return theirs, ours, fmt.Errorf("make output pipe: %w", err)
		}
		theirs, ours = append(theirs, write), append(ours, read)
		if c.user.UID != 0 {
			// So that the user's programs can open /dev/stdout and /dev/stderr.
			_ = unix.Fchown(int(write.Fd()), int(c.user.UID), int(c.user.GID))
		}
		p.streams = append(p.streams, &stream{kind: k, file: read})
	}
	return theirs, ours, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
