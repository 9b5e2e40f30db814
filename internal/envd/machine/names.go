package machine

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/envd/atomicfile"
)

// defaultName is the hostname until the sandbox's id is known.
const defaultName = "sandbox"

// The lines between these two are the agent's, all others the user's.
const (
	blockBegin = "# Wrenn: begin, written anew by the guest agent\n"
	blockEnd   = "# Wrenn: end\n"
)

// Alias is a name for an address, in /etc/hosts.
type Alias struct {
	Addr netip.Addr
	Name string
}

// Name makes id the hostname, unless a user has chosen another one.
func (m *Machine) Name(id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	now, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("read hostname: %w", err)
	}
	if id == now || now != m.named || !validName(id) {
		return nil
	}
	return m.setNameLocked(id)
}

func (m *Machine) setName(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if name == "" {
		name = defaultName
	}
	return m.setNameLocked(name)
}

func (m *Machine) setNameLocked(name string) error {
	if err := unix.Sethostname([]byte(name)); err != nil {
		return err
	}
	m.named = name
	return errors.Join(
		writeFile("/etc/hostname", name+"\n"),
		WriteHosts("/etc/hosts", append([]Alias{{m.params.Address.Addr(), name}}, m.aliases...)),
	)
}

// Alias adds names to /etc/hosts; those added before go.
func (m *Machine) Alias(aliases []Alias) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.aliases = aliases
	return WriteHosts("/etc/hosts", append([]Alias{{m.params.Address.Addr(), m.named}}, aliases...))
}

// validName reports whether name can be a hostname: one label.
func validName(name string) bool {
	if name == "" || len(name) > 63 || name[0] == '-' {
		return false
	}
	return strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") == ""
}

// WriteHosts gives addresses names in the hosts file at path: those given before
// go. It keeps the user's lines, and names loopback where they do not.
func WriteHosts(path string, aliases []Alias) error {
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	kept := withoutBlock(string(old))
	var block strings.Builder
	block.WriteString(blockBegin)
	for _, line := range []string{"127.0.0.1\tlocalhost\n", "::1\tlocalhost ip6-localhost ip6-loopback\n"} {
		addr, _, _ := strings.Cut(line, "\t")
		if !names(kept, addr, "localhost") {
			block.WriteString(line)
		}
	}
	for _, a := range aliases {
		fmt.Fprintf(&block, "%s\t%s\n", a.Addr, a.Name)
	}
	block.WriteString(blockEnd)
	// The block stays where it is: what a user has written behind it counts after it.
	at := strings.Index(string(old), blockBegin)
	if at < 0 || at > len(kept) {
		return writeFile(path, withBlock(kept, block.String()))
	}
	return writeFile(path, kept[:at]+block.String()+kept[at:])
}

// names reports whether a hosts file gives addr the name.
func names(hosts, addr, name string) bool {
	for line := range strings.Lines(hosts) {
		line, _, _ = strings.Cut(line, "#")
		if f := strings.Fields(line); len(f) > 1 && f[0] == addr {
			for _, n := range f[1:] {
				if n == name {
					return true
				}
			}
		}
	}
	return false
}

// withoutBlock takes the agent's lines out. Where a user has removed their end,
// only the line that begins them goes: what follows may be the user's.
func withoutBlock(text string) string {
	for {
		before, rest, found := strings.Cut(text, blockBegin)
		if !found {
			return text
		}
		if _, after, closed := strings.Cut(rest, blockEnd); closed {
			rest = after
		}
		text = before + rest
	}
}

// withBlock appends the agent's lines.
func withBlock(text, block string) string {
	if text != "" && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	return text + block
}

// writeResolver replaces what the image brought: it is of the machine where the
// image was built, or a link to a service that does not run here.
func writeResolver(path string, servers []netip.Addr) error {
	var text strings.Builder
	for _, s := range servers {
		fmt.Fprintf(&text, "nameserver %s\n", s)
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode()&fs.ModeSymlink != 0 {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	return writeFile(path, text.String())
}

// writeFile makes a file of root's hold text, and touches none that does.
func writeFile(path, text string) error {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, []byte(text)) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return atomicfile.Write(path, atomicfile.Options{}, func(w io.Writer) error {
		_, err := io.WriteString(w, text)
		return err
	})
}
