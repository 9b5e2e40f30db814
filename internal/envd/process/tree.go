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
	pid, parent, session int
	dead                 bool // only its status is left
}

// killTree kills a child and all that it has started, where no cgroup does. It
// finds them by descent and by session: a process that was left by its parent is
// in a session that its ancestors were in, unless it made one of its own since the
// last look. It is called with mu held, so the child is not reaped.
func (r *Reaper) killTree(root int) error {
	agentSession, err := unix.Getsid(0)
	if err != nil {
		return err
	}
	members := map[int]bool{root: true}
	sessions := map[int]bool{root: true}
	for range maxKillPasses {
		killed := false
		for _, p := range r.tree(members, sessions, agentSession) {
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

// tree returns who belongs to members by descent or by session, and adds them to
// both. Other children of the agent and what they started are none of them.
func (r *Reaper) tree(members, sessions map[int]bool, agentSession int) []relatives {
	all := processes()
	var found []relatives
	seen := make(map[int]bool)
	for again := true; again; {
		again = false
		for _, p := range all {
			if seen[p.pid] || p.pid == os.Getpid() || r.children[p.session] != nil && !sessions[p.session] {
				continue
			}
			if other := r.children[p.pid] != nil; other && !members[p.pid] {
				continue
			}
			if !members[p.pid] && !members[p.parent] && !sessions[p.session] {
				continue
			}
			seen[p.pid], again = true, true
			members[p.pid] = true
			if p.session != agentSession {
				sessions[p.session] = true
			}
			found = append(found, p)
		}
	}
	// A number may be another's at the next look. Sessions last as long as
	// somebody is in them.
	for pid := range members {
		if !seen[pid] {
			delete(members, pid)
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
	if now, ok := lookAt(p.pid); !ok || now.session != p.session {
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
	session, err2 := strconv.Atoi(string(fields[3]))
	if err1 != nil || err2 != nil {
		return relatives{}, false
	}
	state := fields[0][0]
	return relatives{pid: pid, parent: parent, session: session, dead: state == 'Z' || state == 'X'}, true
}
