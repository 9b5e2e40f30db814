package machine

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/wrenn/wrenn/api/proto/process"
	"github.com/wrenn/wrenn/api/proto/process/processconnect"
)

// built is the directory of the binaries, for the end of the tests.
var built string

// binaries builds the agent and the test guest once.
var binaries = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "machine-test-")
	if err != nil {
		return "", err
	}
	built = dir
	for name, pkg := range map[string]string{"envd": "../../../cmd/envd", "testguest": "./testguest"} {
		build := exec.Command("go", "build", "-o", filepath.Join(dir, name), pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return "", errors.New(string(out))
		}
	}
	return dir, nil
})

// vm is a machine as far as namespaces make one: it has users, processes, mounts,
// a network and names of its own, and ending it ends the namespace.
type vm struct {
	t       *testing.T
	cmd     *exec.Cmd
	out     string // directory that the machine shows as /out
	console bytes.Buffer
	host    netns.NsHandle // the other end of the machine's link
	ended   chan struct{}
	client  *http.Client
}

// The addresses of the link, as slots have them.
const (
	guestAddr = "169.254.0.21:49983"
	uplink    = "10.211.7.1" // from where the host calls: not on the link itself
)

type vmConfig struct {
	cmdline string // "": that of the host, and no proc mounted
	args    string
}

func startVM(t *testing.T, c vmConfig) *vm {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can make the namespaces")
	}
	dir, err := binaries()
	if err != nil {
		t.Skip("cannot build the agent: ", err)
	}
	v := &vm{t: t, ended: make(chan struct{})}
	// Not below a directory that only root may enter: in there root is nobody here.
	if v.out, err = os.MkdirTemp("/var/tmp", "machine-test-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(v.out) })
	if err := os.Chmod(v.out, 0o777); err != nil {
		t.Fatal(err)
	}
	var files []*os.File
	ready, signalReady, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	files = append(files, ready)
	for _, path := range []string{filepath.Join(dir, "envd"), filepath.Join(dir, "testguest")} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	v.cmd = exec.Command("/proc/self/exe")
	v.cmd.Env = append(os.Environ(), stageEnv+"=vm", "MACHINE_TEST_CMDLINE="+c.cmdline, "MACHINE_TEST_ARGS="+c.args, "MACHINE_TEST_OUT="+v.out)
	v.cmd.ExtraFiles = files
	v.cmd.Stdout, v.cmd.Stderr = &v.console, &v.console
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100_000, Size: 65_536}}
	v.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET |
			syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWCGROUP,
		UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
		Credential: &syscall.Credential{},
		Pdeathsig:  0, // the thread that starts it may end before the test
	}
	if err := v.cmd.Start(); err != nil {
		t.Skipf("cannot make namespaces: %v", err)
	}
	for _, f := range files {
		f.Close()
	}
	go func() {
		defer close(v.ended)
		v.cmd.Wait()
	}()
	t.Cleanup(func() {
		v.cmd.Process.Kill()
		<-v.ended
		if t.Failed() {
			t.Logf("console:\n%s", &v.console)
		}
	})
	v.link()
	v.client = &http.Client{Transport: &http.Transport{DialContext: v.dialFrom(v.host, uplink)}}
	t.Cleanup(v.client.CloseIdleConnections)
	signalReady.Write([]byte{1})
	signalReady.Close()
	return v
}

// link makes the host's side of the machine's network.
func (v *vm) link() {
	v.t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	if err != nil {
		v.t.Fatal(err)
	}
	defer here.Close()
	v.host, err = netns.New()
	if err != nil {
		v.t.Skipf("cannot make a network namespace: %v", err)
	}
	v.t.Cleanup(func() { v.host.Close() })
	defer netns.Set(here)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "host0"
	err = netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsPid(v.cmd.Process.Pid)})
	if err != nil {
		v.t.Skipf("cannot make a link: %v", err)
	}
	l, err := netlink.LinkByName("host0")
	if err != nil {
		v.t.Fatal(err)
	}
	for _, text := range []string{"169.254.0.22/30", uplink + "/32"} {
		addr, err := netlink.ParseAddr(text)
		if err == nil {
			err = netlink.AddrAdd(l, addr)
		}
		if err != nil {
			v.t.Fatal(err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		v.t.Fatal(err)
	}
}

// in runs f on a thread in the namespace.
func in(ns netns.NsHandle, f func()) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	if err != nil {
		return err
	}
	defer here.Close()
	if err := netns.Set(ns); err != nil {
		return err
	}
	defer netns.Set(here)
	f()
	return nil
}

// dialFrom connects from an address in a network namespace.
func (v *vm) dialFrom(ns netns.NsHandle, from string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
		d := net.Dialer{Timeout: 2 * time.Second}
		if from != "" {
			d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
		}
		if nsErr := in(ns, func() { conn, err = d.DialContext(ctx, network, addr) }); nsErr != nil {
			return nil, nsErr
		}
		return conn, err
	}
}

// within returns a client in the machine's own network.
func (v *vm) within() *http.Client {
	v.t.Helper()
	ns, err := netns.GetFromPid(v.cmd.Process.Pid)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { ns.Close() })
	c := &http.Client{Transport: &http.Transport{DialContext: v.dialFrom(ns, "")}}
	v.t.Cleanup(c.CloseIdleConnections)
	return c
}

// up waits until the agent answers.
func (v *vm) up() *vm {
	v.t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if resp, err := v.client.Get("http://" + guestAddr + "/health"); err == nil {
			resp.Body.Close()
			return v
		}
		select {
		case <-tick.C:
		case <-v.ended:
			v.t.Fatalf("it ended (%v): %s", v.cmd.ProcessState, &v.console)
		case <-deadline:
			v.t.Fatal("the agent does not answer")
		}
	}
}

func post(t *testing.T, c *http.Client, path, body string) int {
	t.Helper()
	resp, err := c.Post("http://"+path, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// read returns a file of the machine.
func (v *vm) read(path string) string {
	v.t.Helper()
	resp, err := v.client.Get("http://" + guestAddr + "/files?path=" + path)
	if err != nil {
		v.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		v.t.Fatalf("read %s: %s %s %v", path, resp.Status, data, err)
	}
	return string(data)
}

// start runs the test guest and returns its events.
func (v *vm) start(mode string, pty bool) *connect.ServerStreamForClient[process.StartResponse] {
	v.t.Helper()
	off := false
	req := &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/testguest", Args: []string{mode}}, Stdin: &off}
	if pty {
		req.Pty = &process.PTY{Size: &process.PTY_Size{Cols: 80, Rows: 24}}
	}
	s, err := processconnect.NewProcessClient(v.client, "http://"+guestAddr).Start(v.t.Context(), req)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { s.Close() })
	return s
}

// run returns what the test guest wrote.
func (v *vm) run(mode string, pty bool) string {
	v.t.Helper()
	s := v.start(mode, pty)
	var out strings.Builder
	for s.Receive() {
		e := s.Msg().GetEvent()
		out.Write(e.GetData().GetStdout())
		out.Write(e.GetData().GetStderr())
		out.Write(e.GetData().GetPty())
		if end := e.GetEnd(); end != nil && end.GetExitCode() != 0 {
			v.t.Fatalf("%s: %v (%s)", mode, end, &out)
		}
	}
	if err := s.Err(); err != nil {
		v.t.Fatalf("%s: %v", mode, err)
	}
	return out.String()
}

// background starts the test guest and waits until it says that it is ready.
func (v *vm) background(mode string) {
	v.t.Helper()
	s := v.start(mode, false)
	for s.Receive() {
		if strings.Contains(string(s.Msg().GetEvent().GetData().GetStdout()), "ready") {
			return
		}
	}
	v.t.Fatalf("%s is not ready: %v", mode, s.Err())
}

// down waits for the machine's end and returns the signal by which the kernel
// says how it ended.
func (v *vm) down(limit time.Duration) syscall.Signal {
	v.t.Helper()
	select {
	case <-v.ended:
	case <-time.After(limit):
		v.t.Fatalf("the machine runs still after %v", limit)
	}
	return v.cmd.ProcessState.Sys().(syscall.WaitStatus).Signal()
}
