package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/wrenn/wrenn/internal/client"
)

// piped starts the program with its output on a pipe.
func piped(t *testing.T, cmd *exec.Cmd) *reader {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { read.Close() })
	cmd.Stdout = write
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	write.Close()
	return newReader(t, read)
}

func TestSignalsGoToTheCommandFirstAndTheSandboxIsGoneAfterwards(t *testing.T) {
	const stubborn = `trap 'echo trapped' TERM; echo ready; while :; do sleep 0.05; done`
	const polite = `trap 'echo cleaned up; exit 5' TERM; echo ready; while :; do sleep 0.05; done`
	for _, test := range []struct {
		name, script string
		first        syscall.Signal
		then         string         // what the command says after it
		second       syscall.Signal // 0: none
		code         int
	}{
		{"a command that cleans up decides the exit code", polite, syscall.SIGTERM, "cleaned up", 0, 5},
		{"Ctrl-C on one that does nothing about it", "echo ready; exec sleep 60", syscall.SIGINT, "", 0, 130},
		{"SIGTERM on one that does nothing about it", "echo ready; exec sleep 60", syscall.SIGTERM, "", 0, 143},
		{"a second Ctrl-C ends one that goes on", stubborn, syscall.SIGINT, "trapped", syscall.SIGINT, 130},
		{"a second SIGTERM too", stubborn, syscall.SIGTERM, "trapped", syscall.SIGTERM, 143},
		{"nobody is there after SIGHUP", stubborn, syscall.SIGHUP, "", 0, 129},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, dir := newPlatformDir(t)
			cmd := wrennCommand(p, dir, "run", "--", "sh", "-c", test.script)
			out := piped(t, cmd)
			out.await("ready")
			cmd.Process.Signal(test.first)
			if test.then != "" {
				out.await(test.then)
			}
			if test.second != 0 {
				cmd.Process.Signal(test.second)
			}
			if code := exitCode(cmd.Wait()); code != test.code {
				t.Errorf("exit code %d, want %d", code, test.code)
			}
			if left, killed := p.Running(), p.Killed(); len(left) > 0 || len(killed) != 1 {
				t.Errorf("left %v, killed %v", left, killed)
			}
		})
	}
}

func TestABrokenPipeEndsTheSandbox(t *testing.T) {
	p, dir := newPlatformDir(t)
	cmd := wrennCommand(p, dir, "run", "--", "yes")
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = write, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	write.Close()
	io.ReadFull(read, make([]byte, 100))
	read.Close()
	if code := exitCode(cmd.Wait()); code != 141 || stderr.Len() > 0 {
		t.Errorf("exit code %d, %q, want 141 and no word", code, stderr.String())
	}
	if left := p.Running(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestTheEndOfTheSandboxIsTold(t *testing.T) {
	p, dir := newPlatformDir(t)
	cmd := wrennCommand(p, dir, "run", "--", "sh", "-c", "echo ready; exec sleep 60")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out := piped(t, cmd)
	out.await("ready")
	p.KillAll()
	if code := exitCode(cmd.Wait()); code != 137 || !strings.Contains(stderr.String(), "the sandbox ended while the command ran") {
		t.Errorf("exit code %d, %q", code, stderr.String())
	}
}

func TestAnInputThatNeverEndsDoesNotHoldTheProgram(t *testing.T) {
	p, dir := newPlatformDir(t)
	cmd := wrennCommand(p, dir, "run", "--", "head", "-c", "3")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out := piped(t, cmd)
	io.WriteString(stdin, "abcdef")
	out.await("abc")
	if _, err := cmd.Process.Wait(); err != nil { // stdin stays open
		t.Error(err)
	}
	stdin.Close()
}

func TestExecThatIsGivenUpKillsTheCommandNotTheSandbox(t *testing.T) {
	p, dir := newPlatformDir(t)
	c := p.Client()
	info, err := c.Create(t.Context(), client.CreateRequest{TemplateID: "base"})
	if err != nil {
		t.Fatal(err)
	}
	cmd := wrennCommand(p, dir, "sandbox", "exec", info.SandboxID, "--", "sh", "-c", `trap '' TERM; echo pid $$; while :; do sleep 0.05; done`)
	out := piped(t, cmd)
	pid := out.await(`pid (\d+)\n`)[1]
	cmd.Process.Signal(syscall.SIGHUP)
	if code := exitCode(cmd.Wait()); code != 129 {
		t.Errorf("exit code %d, want 129", code)
	}
	result, err := c.Sandbox(info).Run(t.Context(), client.Command{Path: "sh", Args: []string{"-c", "while kill -0 " + pid + " 2>/dev/null; do sleep 0.05; done"}})
	if err != nil || result.Status() != 0 {
		t.Errorf("the command, or the sandbox: %+v, %v", result, err)
	}
}

func TestExecInASandboxThatIsPausedLeavesTheCommandToIt(t *testing.T) {
	p, dir := newPlatformDir(t)
	c := p.Client()
	info, err := c.Create(t.Context(), client.CreateRequest{TemplateID: "base", AutoResume: true})
	if err != nil {
		t.Fatal(err)
	}
	cmd := wrennCommand(p, dir, "sandbox", "exec", info.SandboxID, "--", "sh", "-c", "echo pid $$; exec sleep 60")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	pid := piped(t, cmd).await(`pid (\d+)\n`)[1]
	if err := c.Pause(t.Context(), info.SandboxID, true); err != nil {
		t.Fatal(err)
	}
	if code := exitCode(cmd.Wait()); code != 125 || !strings.Contains(stderr.String(), "is paused: `wrenn sandbox resume "+info.SandboxID+"` wakes it") {
		t.Errorf("exit code %d, %q", code, stderr.String())
	}
	if _, _, err := c.Connect(t.Context(), info.SandboxID, client.ConnectRequest{}); err != nil {
		t.Fatal(err)
	}
	result, err := c.Sandbox(info).Run(t.Context(), client.Command{Path: "kill", Args: []string{"-0", pid}})
	if err != nil || result.Status() != 0 {
		t.Errorf("the command after the pause: %+v, %v", result, err)
	}
}
