package firecracker_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/cgroup"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker"
)

// bootVariable tells this program to be an agent that boots the machine of its input.
const bootVariable = "WRENN_TEST_BOOT"

type bootOrder struct {
	Machine        microvm.Machine
	Binary, Jailer string
}

// bootAsAgent says when it begins, and stays when it is done.
func bootAsAgent() int {
	var order bootOrder
	err := json.NewDecoder(os.Stdin).Decode(&order)
	if err == nil {
		order.Machine.Cgroups, err = cgroup.Find()
	}
	var f *firecracker.Monitor
	if err == nil {
		f, err = firecracker.New(context.Background(), firecracker.Config{Binary: order.Binary, Jailer: order.Jailer})
	}
	if err == nil {
		fmt.Println("begins")
		_, err = f.Boot(context.Background(), order.Machine)
	}
	fmt.Println("ends", err)
	select {}
}

// An agent that is killed at any moment of a start leaves nothing that is not found by
// the machine's cgroup and its directory.
func TestAgentKilledWhileMachineStarts(t *testing.T) { eachJail(t, testAgentKilled) }

func TestRealAgentKilled(t *testing.T) { eachRealJail(t, testAgentKilled) }

func testAgentKilled(t *testing.T, s *site) {
	f := s.monitor(t, "1.15.1", firecracker.Config{})
	begun, finished := 0, 0
	for range 16 {
		m := s.machine(t)
		if s.real != "" {
			m.Kernel = guestKernel(t)
		}
		input, err := json.Marshal(bootOrder{m, f.Binary(), f.Jailer()})
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/proc/self/exe")
		cmd.Env, cmd.Stdin = append(os.Environ(), bootVariable+"=1"), bytes.NewReader(input)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		if !lines.Scan() || lines.Text() != "begins" {
			t.Fatalf("the agent says %q (%v)", lines.Text(), lines.Err())
		}
		kill := time.AfterFunc(rand.N(60*time.Millisecond), func() { _ = cmd.Process.Kill() }) // as it goes on until then
		ended := lines.Scan()
		if ended && lines.Text() != "ends <nil>" {
			t.Errorf("the agent %s", lines.Text())
		}
		kill.Stop()
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // was killed
		n, err := m.Cgroups.PIDs(m.Group)
		if err != nil {
			t.Fatal(err)
		}
		if n > 0 {
			begun++
		}
		if ended {
			finished++
		}
		if err := m.Cgroups.Kill(t.Context(), m.Group); err != nil {
			t.Fatal(err)
		}
		if in, err := os.ReadDir(m.Jail()); err != nil || len(in) > 0 {
			t.Errorf("left in the jail: %v (%v)", in, err)
		}
		mounts, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(mounts), m.Dir) {
			t.Errorf("left mounted below %s:\n%s", m.Dir, mounts)
		}
		if err := os.RemoveAll(m.Dir); err != nil {
			t.Error(err)
		}
	}
	t.Logf("of 16 starts %d had a process when the agent was killed, and %d were over", begun, finished)
}
