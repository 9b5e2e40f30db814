package envd_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/wrenn/wrenn/api/proto/process"
)

// pidsIn reads the pids that a script has written to files in dir.
func pidsIn(t *testing.T, dir string, n int) []int {
	t.Helper()
	var pids []int
	eventually(t, fmt.Sprintf("%d processes have said who they are", n), func() bool {
		pids = nil
		files, _ := filepath.Glob(filepath.Join(dir, "*"))
		for _, f := range files {
			data, _ := os.ReadFile(f)
			if pid, err := strconv.Atoi(strings.TrimSpace(string(data))); err == nil {
				pids = append(pids, pid)
			}
		}
		return len(pids) == n
	})
	return pids
}

// withAndWithoutGroups runs a test with an agent that has cgroups, and with one
// that has none.
func withAndWithoutGroups(t *testing.T, test func(t *testing.T, a *realAgent, groups string)) {
	t.Run("with cgroups", func(t *testing.T) {
		dir := cgroupDir(t)
		test(t, startRealAgent(t, "-cgroups", dir), dir)
	})
	t.Run("without cgroups", func(t *testing.T) { test(t, startRealAgent(t), "") })
}

func TestKillReachesAllThatAProcessStarted(t *testing.T) {
	withAndWithoutGroups(t, func(t *testing.T, a *realAgent, groups string) {
		for name, script := range map[string]string{
			"a child in its group":                 `sleep 1000 & echo $! >$D/a; wait`,
			"a child in a session of its own":      `setsid sh -c 'echo $$ >$D/a; exec sleep 1000' & wait`,
			"an orphan":                            `(sh -c 'echo $$ >$D/a; exec sleep 1000' &); sleep 1000`,
			"what ignores other signals":           `sh -c 'trap "" TERM HUP INT; echo $$ >$D/a; while :; do sleep 1000; done'`,
			"the child of one in its own session":  `setsid sh -c '(sh -c "echo \$\$ >$D/a; exec sleep 1000" &) ; sleep 1000' & wait`,
			"a job of an interactive kind of bash": `set -m; sleep 1000 & echo $! >$D/a; wait`,
		} {
			t.Run(name, func(t *testing.T) {
				dir := t.TempDir()
				req := bash(script)
				req.Process.Envs = map[string]string{"D": dir}
				s, n := start(t.Context(), t, a.processes(), req)
				pids := pidsIn(t, dir, 1)
				kill(t, a.processes(), n)
				for s.Receive() {
					continue
				}
				eventually(t, "the process is gone", func() bool { return !alive(pids[0]) })
			})
		}
	})
}

func TestSignalsReachAProcessThatHasLeftItsGroup(t *testing.T) {
	if _, err := exec.LookPath("perl"); err != nil {
		t.Skip("needs perl, to change the process group")
	}
	withAndWithoutGroups(t, func(t *testing.T, a *realAgent, _ string) {
		for _, sig := range []process.Signal{process.Signal_SIGNAL_SIGTERM, process.Signal_SIGNAL_SIGKILL} {
			s, n := start(t.Context(), t, a.processes(), bash(`exec perl -e '$| = 1; setpgrp(0, getpgrp(getppid)) or die; print getpgrp == $$ ? "stays" : "left"; sleep 1000'`))
			if !s.Receive() || string(s.Msg().GetEvent().GetData().GetStdout()) != "left" {
				t.Fatalf("got %v, %v", s.Msg(), s.Err())
			}
			if _, err := a.processes().SendSignal(t.Context(), &process.SendSignalRequest{Process: pid(n), Signal: sig}); err != nil {
				t.Error(err)
			}
			eventually(t, "it is gone", func() bool { return !alive(int(n)) })
			for s.Receive() {
				continue
			}
		}
	})
}

// Root can leave its cgroup, and remove it.
func TestKillReachesAProcessWhoseCgroupIsGone(t *testing.T) {
	groups := cgroupDir(t)
	a := startRealAgent(t, "-cgroups", groups)
	dir := t.TempDir()
	req := bash(`own=$(grep -o '/user/.*' /proc/self/cgroup)
		echo $$ >$G/agent/cgroup.procs && rmdir $G$own && { setsid sh -c 'echo $$ >$D/a; exec sleep 1000' & wait; }`)
	req.Process.Envs = map[string]string{"D": dir, "G": groups}
	s, n := start(t.Context(), t, a.processes(), req)
	pids := pidsIn(t, dir, 1)
	kill(t, a.processes(), n)
	for s.Receive() {
		continue
	}
	eventually(t, "the process is gone", func() bool { return !alive(pids[0]) })
}

func TestKillEndsAForkBombThatLeftItsSession(t *testing.T) {
	withAndWithoutGroups(t, func(t *testing.T, a *realAgent, _ string) {
		// Whatever becomes of the test, the bomb ends with the directory.
		mark := t.TempDir()
		// Generations of processes, each orphaned by the last and leaving a byte, 40
		// at a time.
		script := `setsid bash -c 'f() { printf . >>$1/born; sleep 0.01; [ -e $1 ] && (f $1 &) ; }; for i in $(seq 40); do (f ` + mark + ` &); done; exec sleep 1000' ` + mark + ` & wait`
		s, n := start(t.Context(), t, a.processes(), bash(script))
		born := func() int64 {
			info, err := os.Stat(filepath.Join(mark, "born"))
			if err != nil {
				return 0
			}
			return info.Size()
		}
		eventually(t, "the bomb is on", func() bool { return born() > 200 })
		kill(t, a.processes(), n)
		for s.Receive() {
			continue
		}
		eventually(t, "the bomb is off", func() bool {
			before := born()
			files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
			for _, f := range files {
				if data, err := os.ReadFile(f); err == nil && strings.Contains(string(data), mark) {
					return false
				}
			}
			return born() == before
		})
	})
}

func TestTheEndOfAProcessLeavesItsBackgroundChildrenAlone(t *testing.T) {
	withAndWithoutGroups(t, func(t *testing.T, a *realAgent, groups string) {
		dir := t.TempDir()
		req := bash(`nohup sleep 1000 >/dev/null 2>&1 & echo $! >$D/a; setsid -f sh -c 'echo $$ >$D/b; exec sleep 1000' >/dev/null 2>&1; while [ ! -s $D/b ]; do :; done`)
		req.Process.Envs = map[string]string{"D": dir}
		if r := run(t, a.processes(), req); r.end.GetExitCode() != 0 {
			t.Fatalf("got end %v: %s", r.end, &r.stderr)
		}
		pids := pidsIn(t, dir, 2)
		for range 3 { // others come and go
			run(t, a.processes(), bash("true"))
		}
		for _, pid := range pids {
			if !alive(pid) {
				t.Errorf("the background process %d has ended", pid)
			}
			p, _ := os.FindProcess(pid)
			defer p.Kill()
		}
		if groups == "" {
			return
		}
		group, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pids[0]))
		if err != nil || !strings.Contains(string(group), filepath.Base(groups)+"/user/") {
			t.Fatalf("the background process is in %s, %v", group, err)
		}
		_, path, _ := strings.Cut(string(group), filepath.Base(groups)+"/")
		path = filepath.Join(groups, strings.Fields(path)[0])
		for _, pid := range pids {
			p, _ := os.FindProcess(pid)
			p.Kill()
		}
		eventually(t, "the cgroup goes with the last", func() bool {
			_, err := os.Stat(path)
			return os.IsNotExist(err)
		})
	})
}

func TestTheAgentGoesBeforeItsProcesses(t *testing.T) {
	needRoot(t)
	a := startRealAgent(t, "-prefer")
	of := func(pid int) string {
		data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
		return strings.TrimSpace(string(data))
	}
	if of(a.pid) != "-1000" {
		t.Skipf("this system lets the agent have OOM score %s only", of(a.pid))
	}
	for range 20 {
		// The grandchild shows what the child was when it forked at once.
		r := run(t, a.processes(), &process.StartRequest{Process: &process.ProcessConfig{
			Cmd: "/bin/sh", Args: []string{"-c", "(cat /proc/self/oom_score_adj); nice; cat /proc/self/oom_score_adj"}}})
		if got := r.stdout.String(); got != "100\n0\n100\n" {
			t.Fatalf("got OOM score, niceness, OOM score %q: %s", got, &r.stderr)
		}
	}
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", a.pid))
	for _, thread := range threads {
		data, err := os.ReadFile(thread)
		if err != nil {
			continue
		}
		fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
		if fields[16] != "-20" {
			t.Errorf("%s has niceness %s", thread, fields[16])
		}
	}
}
