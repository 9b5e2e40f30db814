package envd_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn/wrenn/api/proto/process"
)

// jailed starts the agent as pid 1 of namespaces of its own, in a cgroup that may
// hold few tasks: all tasks of the machine, for what is in it.
func jailed(t *testing.T, tasks int) (*agent, string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: it makes namespaces and a cgroup")
	}
	group := filepath.Join("/sys/fs/cgroup/pids", fmt.Sprintf("envd-test-%d", os.Getpid()))
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Skipf("needs the pids controller of cgroup version 1: %v", err)
	}
	t.Cleanup(func() {
		var err error
		for range 100 { // what was killed leaves it soon
			if err = os.Remove(group); err == nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		t.Error(err)
	})
	if err := os.WriteFile(filepath.Join(group, "pids.max"), fmt.Append(nil, tasks), 0o644); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(t.TempDir(), "envd")
	build := exec.Command("go", "build", "-o", binary, "github.com/wrenn/wrenn/cmd/envd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v\n%s", err, out)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	var output bytes.Buffer
	cmd := exec.Command("/bin/sh", "-c", `mount -t proc proc /proc && mount -t tmpfs tmpfs /run && echo 0 > "$0/cgroup.procs" && exec "$1" -listen "$2" -forward=false`, group, binary, address)
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("the agent says:\n%.2000s", output.String())
		}
	})
	a := &agent{url: "http://" + address, http: &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{}}}
	t.Cleanup(a.http.CloseIdleConnections)
	deadline := time.Now().Add(20 * time.Second)
	for a.healthy() != nil {
		if time.Now().After(deadline) {
			t.Fatalf("the agent does not answer: %v", a.healthy())
		}
		time.Sleep(20 * time.Millisecond) // between two looks
	}
	return a, group
}

func (a *agent) healthy() error {
	resp, err := a.http.Get(a.url + "/health")
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		return fmt.Errorf("GET /health: %s", resp.Status)
	}
	return nil
}

// Go ends a program that is refused a thread. What the agent does while it can
// get none needs several at a time.
func TestTheAgentOutlivesAForkBombThatTakesEveryTask(t *testing.T) {
	a, group := jailed(t, 120)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	stream, err := a.processes().Start(ctx, &process.StartRequest{
		Process: &process.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-c", ":(){ :|:& };:; sleep 100"}}, Stdin: new(bool),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	pid := stream.Msg().GetEvent().GetStart().GetPid()
	for range 15 {
		var uploads sync.WaitGroup
		for i := range 20 {
			uploads.Go(func() {
				path := fmt.Sprintf("/files?username=root&path=%s/%d", t.TempDir(), i)
				req, _ := http.NewRequestWithContext(ctx, "POST", a.url+path, strings.NewReader(strings.Repeat("x", 100_000)))
				req.Header.Set("Content-Type", "application/octet-stream")
				if resp, err := a.http.Do(req); err != nil {
					t.Error(err)
				} else {
					resp.Body.Close()
				}
			})
		}
		if err := a.healthy(); err != nil {
			t.Fatal(err)
		}
		uploads.Wait()
	}
	if events, err := os.ReadFile(filepath.Join(group, "pids.events")); err == nil && strings.Contains(string(events), "max 0") {
		t.Errorf("the bomb has not filled the cgroup: %s", events)
	}
	_, err = a.processes().SendSignal(ctx, &process.SendSignalRequest{
		Process: &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: pid}}, Signal: process.Signal_SIGNAL_SIGKILL,
	})
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		left, err := os.ReadFile(filepath.Join(group, "cgroup.procs"))
		if err != nil {
			t.Fatal(err)
		}
		if n := bytes.Count(left, []byte("\n")); n == 1 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("%d processes are left of the bomb", n-1)
		}
		time.Sleep(20 * time.Millisecond) // between two looks
	}
	if err := a.healthy(); err != nil {
		t.Fatal(err)
	}
}
