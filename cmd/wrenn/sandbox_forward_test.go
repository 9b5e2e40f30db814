package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/client/clienttest"
)

// countServer is a server in a sandbox that answers, when its client has ended its
// direction, how much came.
func countServer(t *testing.T) int {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer c.Close()
				n, err := io.Copy(io.Discard, c)
				fmt.Fprintf(c, "%d bytes, %v\n", n, err)
			})
		}
	})
	t.Cleanup(func() { ln.Close(); running.Wait() })
	return ln.Addr().(*net.TCPAddr).Port
}

func newSandbox(t *testing.T, p *clienttest.Platform) string {
	t.Helper()
	info, err := p.Client().Create(context.Background(), client.CreateRequest{TemplateID: "base"})
	if err != nil {
		t.Fatal(err)
	}
	return info.SandboxID
}

func dialLocal(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}

// checkCount has a server of countServer count what is sent to addr.
func checkCount(t *testing.T, addr string) {
	t.Helper()
	c := dialLocal(t, addr)
	c.Write(make([]byte, 300_000))
	c.CloseWrite()
	if answer, err := io.ReadAll(c); err != nil || string(answer) != "300000 bytes, <nil>\n" {
		t.Errorf("answer at %s = %q, %v", addr, answer, err)
	}
}

func TestForwardedPortsAreReached(t *testing.T) {
	p, dir := newPlatformDir(t)
	id, port := newSandbox(t, p), countServer(t)
	cmd := wrennCommand(p, dir, "sandbox", "forward", id[:8], fmt.Sprintf("0:%d", port), fmt.Sprintf("127.0.0.1:0:%d", port), "0:1")
	errs, stderr, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = stderr
	out := piped(t, cmd)
	stderr.Close()
	failures := newReader(t, errs)

	localhost := out.await(fmt.Sprintf(`forwarding 127.0.0.1:(\d+) -> %s:%d\n`, id, port))[1]
	if _, err := os.Stat("/proc/net/if_inet6"); err == nil {
		out.await(fmt.Sprintf(`forwarding \[::1\]:%s -> %s:%d\n`, localhost, id, port))
		checkCount(t, "[::1]:"+localhost)
	}
	checkCount(t, "127.0.0.1:"+localhost)
	other := out.await(fmt.Sprintf(`forwarding 127.0.0.1:(\d+) -> %s:%d\n`, id, port))[1]
	checkCount(t, "127.0.0.1:"+other)

	// A port that nobody listens on fails the connection alone.
	closed := dialLocal(t, "127.0.0.1:"+out.await(fmt.Sprintf(`forwarding 127.0.0.1:(\d+) -> %s:1\n`, id))[1])
	if b, err := io.ReadAll(closed); err == nil {
		t.Errorf("a connection to a closed port ended properly, with %q", b)
	}
	failures.await(`wrenn: connection from 127.0.0.1:\d+ to port 1: .*port is not open`)
	checkCount(t, "127.0.0.1:"+other)

	// The end of the sandbox is the end of all of it.
	open := dialLocal(t, "127.0.0.1:"+other)
	open.Write([]byte("x"))
	p.KillAll()
	if b, err := io.ReadAll(open); err == nil {
		t.Errorf("a connection to a sandbox that has ended came to a proper end, with %q", b)
	}
	failures.await("wrenn: forwarding has ended: no sandbox " + id)
	if code := exitCode(cmd.Wait()); code != 1 {
		t.Errorf("exit code %d", code)
	}
}

func TestForwardingNoticesTheEndOfAnIdleSandbox(t *testing.T) {
	p, dir := newPlatformDir(t)
	cmd := wrennCommand(p, dir, "sandbox", "forward", newSandbox(t, p), "0:80")
	var failures bytes.Buffer
	cmd.Stderr = &failures
	out := piped(t, cmd)
	out.await("forwarding")
	p.KillAll()
	if code := exitCode(cmd.Wait()); code != 1 || !strings.Contains(failures.String(), "forwarding has ended: no sandbox") {
		t.Errorf("exit code %d; %s", code, failures.String())
	}
}

func TestInterruptEndsForwardingInOrder(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		p, dir := newPlatformDir(t)
		cmd := wrennCommand(p, dir, "sandbox", "forward", newSandbox(t, p), fmt.Sprintf("0:%d", countServer(t)))
		var failures bytes.Buffer
		cmd.Stderr = &failures
		out := piped(t, cmd)
		open := dialLocal(t, "127.0.0.1:"+out.await(`forwarding 127.0.0.1:(\d+)`)[1])
		open.Write([]byte("x"))
		cmd.Process.Signal(signal)
		if code := exitCode(cmd.Wait()); code != 0 || failures.Len() > 0 {
			t.Errorf("%v: exit code %d, %s", signal, code, failures.String())
		}
	}
}

func TestStandardStreamsAreAConnection(t *testing.T) {
	p, dir := newPlatformDir(t)
	id := newSandbox(t, p)
	run := func(port int, stdin io.Reader) (string, string, int) {
		cmd := wrennCommand(p, dir, "sandbox", "forward", "--stdio", id, fmt.Sprint(port))
		var out, failures bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &failures
		err := cmd.Run()
		return out.String(), failures.String(), exitCode(err)
	}
	port := countServer(t)
	if out, failures, code := run(port, strings.NewReader(strings.Repeat("x", 300_000))); out != "300000 bytes, <nil>\n" || code != 0 {
		t.Errorf("%q, %q, exit code %d", out, failures, code)
	}
	if out, failures, code := run(1, strings.NewReader("")); out != "" || !strings.Contains(failures, "port is not open") || code != 1 {
		t.Errorf("closed port: %q, %q, exit code %d", out, failures, code)
	}

	// Nothing comes from stdin any more, and the program ends all the same.
	stdin, keep, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer keep.Close()
	keep.WriteString("x")
	cmd := wrennCommand(p, dir, "sandbox", "forward", "--stdio", id, fmt.Sprint(port))
	var failures bytes.Buffer
	cmd.Stdin, cmd.Stderr = stdin, &failures
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.AwaitPort(1)
	p.KillAll()
	if code := exitCode(cmd.Wait()); code != 1 || !strings.Contains(failures.String(), "forwarding has ended: no sandbox") {
		t.Errorf("ended sandbox: exit code %d, %s", code, failures.String())
	}
}

func TestHangupEndsStandardStreamsWithoutAWord(t *testing.T) {
	p, dir := newPlatformDir(t)
	stdin, keep, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer keep.Close()
	cmd := wrennCommand(p, dir, "sandbox", "forward", "--stdio", newSandbox(t, p), fmt.Sprint(countServer(t)))
	var failures bytes.Buffer
	cmd.Stdin, cmd.Stderr = stdin, &failures
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.AwaitPort(1)
	cmd.Process.Signal(syscall.SIGHUP)
	if code := exitCode(cmd.Wait()); code != 129 || failures.Len() > 0 {
		t.Errorf("exit code %d, %s", code, failures.String())
	}
}

func TestPairsOfPorts(t *testing.T) {
	for arg, want := range map[string]forward{
		"80":                {"localhost:80", 80},
		"8080:80":           {"localhost:8080", 80},
		"0:80":              {"localhost:0", 80},
		"0.0.0.0:8080:80":   {"0.0.0.0:8080", 80},
		"[::1]:8080:80":     {"[::1]:8080", 80},
		":8080:80":          {":8080", 80},
		"localhost:0:65535": {"localhost:0", 65535},
	} {
		if got, err := parseForward(arg); err != nil || got != want {
			t.Errorf("%s is %+v, %v; want %+v", arg, got, err, want)
		}
	}
	for _, arg := range []string{"", ":", "80:", ":80", "0", "70000", "70000:80", "-1:80", "x:80", "80:x", "::1:80:80", "80:49983", "1.2.3.4:80"} {
		if got, err := parseForward(arg); err == nil {
			t.Errorf("%s is %+v", arg, got)
		}
	}
}
