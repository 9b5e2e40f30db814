package process

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxKillPasses bounds how often killTree looks for processes that were started
// while it killed others.
const maxKillPasses = 1000

// maxUnsurePasses bounds how often it looks again only because a process ended
// while it looked, which on a busy system is always so.
const maxUnsurePasses = 20

// relatives says where a process stands among others.
type relatives struct {
	pid, parent, group, session int

	dead bool // only its status is left
}

// family is a child and what it has started, as far as can be seen.
type family struct {
	members, groups, sessions map[int]bool
	ended                     map[int]bool // members that were seen dead
	others                    map[int]bool // the agent's other children
	agent                     relatives
}

// killTree kills a child and all that it has started, where no cgroup does. It
// finds them by descent, process group and session: a process that was left by its
// parent is where its ancestors were, unless it made a session of its own since
// the last look. Looking takes time, in which a fork bomb's whole generation may
// have gone: so it kills what it knows on sight, and has ended only when nobody
// was found and nobody vanished while it looked. It is called with mu held, so the
// child is not reaped.
func (r *Reaper) killTree(root int) error {
	f := family{members: map[int]bool{root: true}, groups: map[int]bool{root: true}, sessions: map[int]bool{},
		others: make(map[int]bool), ended: make(map[int]bool)}
	var ok bool
	if f.agent, ok = lookAt(os.Getpid()); !ok { // no /proc
		return signalGroup(root, syscall.SIGKILL)
	}
	for pid := range r.children {
		f.others[pid] = pid != root
	}
	unsure := 0
	for range maxKillPasses {
		f.grow()
		found, vanished := f.kill(root)
		// Last, so that its children can be told from orphans before.
		if err := signalGroup(root, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
		if found {
			unsure = 0
			continue
		}
		if unsure++; !vanished || unsure > maxUnsurePasses {
			break
		}
	}
	return nil
}

// has reports whether p belongs to the family. Other children of the agent and
// what they started do not.
func (f *family) has(p relatives) bool {
	return p.pid != f.agent.pid && !f.others[p.pid] &&
		(f.members[p.pid] || f.members[p.parent] || f.groups[p.group] || f.sessions[p.session])
}

func (f *family) add(p relatives) {
	f.members[p.pid] = true
	// Not where others are too: the agent, or another child.
	if p.group != f.agent.group && !f.others[p.group] {
		f.groups[p.group] = true
	}
	if p.session != f.agent.session && !f.others[p.session] {
		f.sessions[p.session] = true
	}
}

// grow adds to the family who belongs to it, in whatever order they are listed.
func (f *family) grow() {
	var all []relatives
	eachProcess(func(p relatives) { all = append(all, p) })
	seen := make(map[int]bool)
	for again := true; again; {
		again = false
		for _, p := range all {
			if !seen[p.pid] && f.has(p) {
				seen[p.pid], again = true, true
				f.add(p)
			}
		}
	}
	// A number may be another's at the next look. Groups and sessions last as long
	// as somebody is in them.
	for pid := range f.members {
		if !seen[pid] {
			delete(f.members, pid)
		}
	}
}

// kill kills the members but root, each as soon as it is seen. It reports whether
// there were any, and whether a process, of the family or not, ended meanwhile.
func (f *family) kill(root int) (found, vanished bool) {
	vanished = eachProcess(func(p relatives) {
		if !f.has(p) {
			return
		}
		f.add(p)
		switch {
		case p.pid == root:
		case !p.dead:
			found = killMember(p) || found
		case !f.ended[p.pid]:
			f.ended[p.pid] = true // it may have forked just before
			found = true
		}
	})
	return found, vanished
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

// eachProcess shows every process that can be seen. It reports whether one was
// gone before its turn.
func eachProcess(show func(relatives)) (vanished bool) {
	dir, err := os.Open("/proc")
	if err != nil {
		return false
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if p, ok := lookAt(pid); ok {
			show(p)
		} else {
			vanished = true
		}
	}
	return vanished
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
