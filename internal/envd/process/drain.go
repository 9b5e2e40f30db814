package process

import (
	"bytes"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// drainQuiet is how long nothing may come from a process's outputs after it
	// has exited before its output counts as complete, when another process still
	// holds them open.
	drainQuiet = 50 * time.Millisecond
	// drainLimit bounds that for a child that keeps writing, or working.
	drainLimit = time.Second
)

// drain waits until the output of the process, which has exited, is complete:
// usually at once, when its outputs are closed. Children that hold them open may
// have more to say (tee at the end of a script) or be there to stay (a server in
// the background), so they get a moment, and on a busy machine until they have
// had their turn on a processor.
func (p *Process) drain() {
	written := make([]int64, len(p.streams)) // by the process itself, at least
	for i, s := range p.streams {
		written[i] = s.written()
	}
	limit := time.Now().Add(drainLimit)
	quiet := time.NewTimer(drainQuiet)
	defer quiet.Stop()
	for {
		allEOF, idle, delivered := true, true, true
		for i, s := range p.streams {
			if s.eof.Load() {
				continue
			}
			allEOF = false
			n := s.delivered.Load()
			delivered = delivered && n >= written[i]
			idle = idle && n >= s.written()
		}
		if allEOF || (delivered && time.Now().After(limit)) {
			return
		}
		select {
		case <-p.activity:
			quiet.Reset(drainQuiet)
		case <-quiet.C:
			if idle && !p.runnable() {
				return
			}
			quiet.Reset(drainQuiet)
		}
	}
}

// written returns how much has been written to the stream so far, read or not.
func (s *stream) written() int64 {
	conn, err := s.file.SyscallConn()
	if err != nil {
		return 0
	}
	var n int64
	// Fails when the file has been closed: then all has been read.
	_ = conn.Control(func(fd uintptr) {
		s.mu.Lock()
		defer s.mu.Unlock()
		waiting, _ := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		n = s.taken + int64(waiting)
	})
	return n
}

// runnable says whether anything in the process's group or session has work to do
// that it could not do yet: it waits for a processor or a disk. Where the kernel
// does not tell, nothing has.
func (p *Process) runnable() bool {
	proc, err := os.Open("/proc")
	if err != nil {
		return false
	}
	defer proc.Close()
	names, _ := proc.Readdirnames(-1)
	for _, name := range names {
		if name[0] < '0' || name[0] > '9' {
			continue
		}
		stat, err := os.ReadFile("/proc/" + name + "/stat")
		if err != nil {
			continue // it has just ended
		}
		if state, group, session := parseStat(stat); (state == 'R' || state == 'D') && (group == p.pid || session == p.pid) {
			return true
		}
	}
	return false
}

// parseStat takes the state, process group and session out of /proc/PID/stat; all
// zero when it is not one. The second field, a name in parentheses, may hold
// anything.
func parseStat(stat []byte) (state byte, group, session int) {
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 4 {
		return 0, 0, 0
	}
	group, _ = strconv.Atoi(string(fields[2]))
	session, _ = strconv.Atoi(string(fields[3]))
	return fields[0][0], group, session
}
