package user

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxAnswers bounds how many answers of each kind are kept.
	maxAnswers = 256
	// maxDatabase is how much of a file is looked at, in bytes.
	maxDatabase = 64 << 20
	// maxGroups is how many groups the kernel lets a process have.
	maxGroups = 1 << 16
	// settled is how old a change of a file must be for what was read after it to
	// be kept: until then another one may have left no trace in its times.
	settled = time.Second
)

// database answers from the account files, and keeps the answers until the files
// change. The files are the sandbox's, so anything may be in them.
type database struct {
	passwd, group string // paths

	mu       sync.Mutex
	seen     [2]identity
	accounts map[string]User     // by name, without groups
	members  map[string][]uint32 // supplementary groups by account
	users    map[uint32]string
	groups   map[uint32]string
}

// identity tells one state of a file from another; zero for no file.
type identity struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

func identify(path string) identity {
	var s unix.Stat_t
	if unix.Stat(path, &s) != nil {
		return identity{}
	}
	return identity{dev: uint64(s.Dev), ino: s.Ino, size: s.Size, mtime: s.Mtim, ctime: s.Ctim}
}

func (i identity) settled() bool {
	age := time.Since(time.Unix(i.ctime.Unix()))
	return age > settled || age < -settled // set back since
}

// refresh forgets what was read from files that have changed since. Called with
// mu held before every answer.
func (d *database) refresh() {
	now := [2]identity{identify(d.passwd), identify(d.group)}
	if now == d.seen && now[0].settled() && now[1].settled() && d.accounts != nil {
		return
	}
	d.seen = now
	d.accounts, d.members = make(map[string]User), make(map[string][]uint32)
	d.users, d.groups = make(map[uint32]string), make(map[uint32]string)
}

// account finds the account called name.
func (d *database) account(name string) (User, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refresh()
	if u, ok := d.accounts[name]; ok {
		return u, nil
	}
	var found *User
	err := scan(d.passwd, func(line []byte) bool {
		if u, ok := parseAccount(line); ok && u.Name == name {
			found = &u
		}
		return found == nil
	})
	switch {
	case err != nil:
		return User{}, err
	case found == nil && name == "root":
		// Root is root even in an image without an account database.
		found = &User{Name: "root", Home: "/root"}
	case found == nil:
		return User{}, UnknownError{Name: name}
	}
	keep(d.accounts, name, *found)
	return *found, nil
}

// memberships returns all groups of an account, its own first.
func (d *database) memberships(u User) ([]uint32, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refresh()
	if gids, ok := d.members[u.Name]; ok {
		return slices.Clone(gids), nil
	}
	gids := []uint32{u.GID}
	known := map[uint32]bool{u.GID: true}
	err := scan(d.group, func(line []byte) bool {
		_, gid, members, ok := parseGroup(line)
		if ok && !known[gid] && isMember(members, u.Name) {
			gids, known[gid] = append(gids, gid), true
		}
		return len(gids) < maxGroups
	})
	if err != nil {
		return nil, err
	}
	keep(d.members, u.Name, gids)
	return slices.Clone(gids), nil
}

// userName returns the name of the account with the uid, "" when there is none.
func (d *database) userName(uid uint32) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refresh()
	if name, ok := d.users[uid]; ok {
		return name
	}
	var name string
	_ = scan(d.passwd, func(line []byte) bool {
		if u, ok := parseAccount(line); ok && u.UID == uid {
			name = u.Name
		}
		return name == ""
	})
	keep(d.users, uid, name)
	return name
}

// groupName returns the name of the group with the gid, "" when there is none.
func (d *database) groupName(gid uint32) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refresh()
	if name, ok := d.groups[gid]; ok {
		return name
	}
	var found string
	_ = scan(d.group, func(line []byte) bool {
		if name, number, _, ok := parseGroup(line); ok && number == gid {
			found = name
		}
		return found == ""
	})
	keep(d.groups, gid, found)
	return found
}

// keep remembers an answer, in place of all others when there are too many.
func keep[K comparable, V any](answers map[K]V, key K, value V) {
	if len(answers) >= maxAnswers {
		clear(answers)
	}
	answers[key] = value
}

// scan calls each with the lines of a file until that returns false. A file that
// is missing has none.
func scan(path string, each func(line []byte) bool) error {
	// Opening must not wait, whatever the sandbox has put there.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read accounts: %w", err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return fmt.Errorf("read accounts: %s is no regular file", path)
	}
	lines := bufio.NewScanner(io.LimitReader(f, maxDatabase))
	lines.Buffer(nil, maxDatabase)
	for lines.Scan() {
		if !each(lines.Bytes()) {
			return nil
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read accounts: %w", err)
	}
	return nil
}

// parseAccount reads a line of /etc/passwd: name:password:uid:gid:comment:home:shell.
func parseAccount(line []byte) (User, bool) {
	fields := bytes.SplitN(bytes.TrimSpace(line), []byte(":"), 7)
	if len(fields) < 6 || !isName(fields[0]) {
		return User{}, false
	}
	uid, ok := parseID(fields[2])
	gid, ok2 := parseID(fields[3])
	if !ok || !ok2 {
		return User{}, false
	}
	home := fields[5]
	if bytes.IndexByte(home, 0) >= 0 {
		return User{}, false // no program could be given it
	}
	return User{Name: string(fields[0]), UID: uid, GID: gid, Home: string(home)}, true
}

// parseGroup reads a line of /etc/group: name:password:gid:member,member.
func parseGroup(line []byte) (name string, gid uint32, members []byte, ok bool) {
	fields := bytes.SplitN(bytes.TrimSpace(line), []byte(":"), 4)
	if len(fields) < 4 || !isName(fields[0]) {
		return "", 0, nil, false
	}
	gid, ok = parseID(fields[2])
	return string(fields[0]), gid, fields[3], ok
}

// isName tells a name from a comment, from nothing, from a reference to another
// database, and from what no program could be given.
func isName(name []byte) bool {
	return len(name) > 0 && name[0] != '#' && name[0] != '+' && name[0] != '-' && bytes.IndexByte(name, 0) < 0
}

func isMember(list []byte, name string) bool {
	for member := range bytes.SplitSeq(list, []byte(",")) {
		if string(bytes.TrimSpace(member)) == name {
			return true
		}
	}
	return false
}

// parseID reads the number of an account or group. The highest one means "no
// change" to the kernel, and is none.
func parseID(field []byte) (uint32, bool) {
	id, err := strconv.ParseUint(string(field), 10, 32)
	return uint32(id), err == nil && id != math.MaxUint32
}
