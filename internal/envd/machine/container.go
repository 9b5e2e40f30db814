package machine

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Container is the container whose pid 1 this process is. Its engine has set up
// all that there is, its name too; but it may have been started before it was
// known which sandbox it becomes, or be a copy of another one.
type Container struct {
	root string // what /etc is in

	mu    sync.Mutex
	named string // the hostname given last, by the engine or by us
	once  string // that of the sandbox whose files these were before, or empty
}

// NewContainer reads the name that the engine has given, and from the file named
// once that of the sandbox of which the container has the files, if any. It
// returns nil in a container that shares the host's name.
func NewContainer(once string) *Container {
	const hostNamespace = 0xEFFFFFFE // a constant of the kernel
	var stat unix.Stat_t
	if err := unix.Stat("/proc/self/ns/uts", &stat); err == nil && stat.Ino == hostNamespace {
		return nil
	}
	name, err := os.Hostname()
	if err != nil {
		return nil
	}
	before, _ := os.ReadFile(once) // a new sandbox has none
	return &Container{root: "/", named: name, once: strings.TrimSpace(string(before))}
}

// Name makes id the hostname, unless a user has chosen another one.
func (c *Container) Name(id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("read hostname: %w", err)
	}
	if id == c.named || now != c.named && now != id || !validName(id) {
		return nil
	}
	if now != id {
		if err := unix.Sethostname([]byte(id)); err != nil {
			return fmt.Errorf("set hostname: %w", err)
		}
	}
	old := []string{c.named, c.once}
	c.named, c.once = id, ""
	return errors.Join(
		rewrite(filepath.Join(c.root, "etc/hostname"), func(text string) string {
			if !slices.Contains(old, strings.TrimSpace(text)) {
				return text
			}
			return id + "\n"
		}),
		rewrite(filepath.Join(c.root, "etc/hosts"), func(text string) string { return renamed(text, old, id) }),
	)
}

// renamed gives the addresses that a hosts file calls one of the old names, and
// nothing else, the new one.
func renamed(hosts string, old []string, name string) string {
	var all strings.Builder
	for line := range strings.Lines(hosts) {
		if f := strings.Fields(line); len(f) == 2 && slices.Contains(old, f[1]) && f[0] != "127.0.0.1" && f[0] != "::1" {
			line = f[0] + "\t" + name + "\n"
		}
		all.WriteString(line)
	}
	return all.String()
}

// rewrite changes a file of root's. One that is missing stays so.
func rewrite(path string, change func(string) string) error {
	old, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if text := []byte(change(string(old))); !bytes.Equal(text, old) {
		return writeFile(path, string(text))
	}
	return nil
}
