package envd_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// buildAgent builds the agent and returns a path to run it by, which is there as
// long as the test's process and leaves no file behind.
var buildAgent = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "envd-agent")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "envd")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "../../cmd/envd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd), err
})

// realAgent is an agent in a process of its own, as it runs in a sandbox.
type realAgent struct {
	*agent
	pid int
}

func startRealAgent(t *testing.T, flags ...string) *realAgent {
	t.Helper()
	path, err := buildAgent()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("no go command to build the agent with")
	}
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	cmd := exec.Command(path, append([]string{"-listen", address}, flags...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("agent: %v: %s", err, &stderr)
		}
	})
	client := &http.Client{Transport: &http.Transport{DisableCompression: true}}
	t.Cleanup(client.CloseIdleConnections)
	a := &realAgent{agent: &agent{url: "http://" + address, http: client}, pid: cmd.Process.Pid}
	eventually(t, "the agent answers", func() bool {
		resp, err := client.Get(a.url + "/health")
		if err == nil {
			resp.Body.Close()
		}
		return err == nil
	})
	return a
}

// cgroupDir makes a cgroup for an agent, which is removed after it has ended.
func cgroupDir(t *testing.T) string {
	t.Helper()
	needRoot(t)
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		if fields[2] != "cgroup2" {
			continue
		}
		dir, err := os.MkdirTemp(fields[1], "envd-test-")
		if err != nil {
			continue
		}
		t.Cleanup(func() {
			eventually(t, "the test's cgroups can be removed", func() bool {
				_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
					if err == nil && d.IsDir() {
						defer syscall.Rmdir(path)
						_ = os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0)
					}
					return nil
				})
				for _, sub := range []string{"user/*", "user", "agent", ""} {
					paths, _ := filepath.Glob(filepath.Join(dir, sub))
					for _, path := range paths {
						syscall.Rmdir(path)
					}
				}
				_, err := os.Stat(dir)
				return err != nil
			})
		})
		return dir
	}
	t.Skip("there is no writable cgroup hierarchy of version 2")
	return ""
}

// alive reports whether a process runs: a zombie does not.
func alive(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	after := stat[bytes.LastIndexByte(stat, ')')+1:]
	return after[1] != 'Z' && after[1] != 'X'
}
