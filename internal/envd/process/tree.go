package process

import (
	"bytes"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxKillPasses bounds how often killTree looks for processes that were started
// while it killed others.
const maxKillPasses = 1000

// relatives says where a process stands among others.
type relatives struct {
	pid, parent, group, session int

	dead bool // only its status is left
}

// family is a child and what it has started, as far as can be seen.
type family struct {
	members, groups, sessions map[int]bool
	agent                     relatives
}

// killTree kills a child and all that it has started, where no cgroup does. It
// finds them by descent, process group and session: a process that was left by its
// parent is where its ancestors were, unless it made a session of its own since
// the last look. It is called with mu held, so the child is not reaped.
func (r *Reaper) killTree(root int) error {
	f := family{members: map[int]bool{root: true}, groups: map[int]bool{root: true}, sessions: map[int]bool{}}
	var ok bool
	if f.agent, ok = lookAt(os.Getpid()); !ok { // no /proc
		return syscall.Kill(-root, syscall.SIGKILL)
	}
	for range maxKillPasses {
		killed := false
		for _, p := range r.find(&f) {
			if !p.dead && p.pid != root {
				killed = killMember(p) || killed
			}
		}
		// Last, so that its children can be told from orphans before.
		if err := syscall.Kill(-root, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
			return err
		}
		if !killed {
			break
		}
	}
	return nil
}

// find returns who belongs to the family, and adds them to it. Other children of
// the agent and what they started do not.
func (r *Reaper) find(f *family) []relatives {
	all := processes()
	var found []relatives
	seen := make(map[int]bool)
	for again := true; again; {
		again = false
		for _, p := range all {
			if seen[p.pid] || p.pid == f.agent.pid || r.children[p.pid] != nil && !f.members[p.pid] ||
				!f.members[p.pid] && !f.members[p.parent] && !f.groups[p.group] && !f.sessions[p.session] {
				continue
			}
			seen[p.pid], again = true, true
			f.members[p.pid] = true
			// Not where others are too: the agent, or another child.
			if p.group != f.agent.group && (r.children[p.group] == nil || f.members[p.group]) {
				f.groups[p.group] = true
			}
			if p.session != f.agent.session && (r.children[p.session] == nil || f.members[p.session]) {
				f.sessions[p.session] = true
			}
			found = append(found, p)
		}
	}
	// A number may be another's at the next look. Groups and sessions last as long
	// as somebody is in them.
	for pid := range f.members {
		if !seen[pid] {
			delete(f.members, pid)
		}
	}
	return found
}

// killMember kills p unless the number is another process's by now.
func killMember(p relatives) bool {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if err != nil {
		return err == unix.ENOSYS && syscall.Kill(p.pid, syscall.SIGKILL) == nil
	}
	defer unix.Close(fd)
	// Of the same session still: either it is p, or it belongs to the tree too.
	if now, ok := lookAt(p.pid); !ok || now.session != p.session || now.group != p.group {
		return true // there was something: look again
	}
	return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil
}

// processes lists all processes that can be seen.
func processes() []relatives {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	var all []relatives
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			if p, ok := lookAt(pid); ok {
				all = append(all, p)
			}
		}
	}
	return all
}

func lookAt(pid int) (relatives, bool) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return relatives{}, false
	}
	return relativesFrom(pid, data)
}

// relativesFrom reads /proc/<pid>/stat: "pid (name) state parent group session …",
// where the name is the program's choice.
func relativesFrom(pid int, data []byte) (relatives, bool) {
	end := bytes.LastIndexByte(data, ')')
	fields := bytes.Fields(data[end+1:])
	if end < 0 || len(fields) < 4 {
		return relatives{}, false
	}
	parent, err1 := strconv.Atoi(string(fields[1]))
	group, err2 := strconv.Atoi(string(fields[2]))
	session, err3 := strconv.Atoi(string(fields[3]))
	if err1 != nil || err2 != nil || err3 != nil {
		return relatives{}, false
	}
	state := fields[0][0]
	return relatives{pid: pid, parent: parent, group: group, session: session, dead: state == 'Z' || state == 'X'}, true
}
