package machine

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func TestABareMachineBecomesASystem(t *testing.T) {
	t.Parallel()
	v := startVM(t, vmConfig{}).up()
	mounts := v.read("/proc/self/mountinfo")
	for _, want := range []string{"/proc proc", "/sys sysfs", "/dev/pts devpts", "/dev/shm tmpfs", "/run tmpfs"} {
		path, kind, _ := strings.Cut(want, " ")
		if !slices.ContainsFunc(strings.Split(mounts, "\n"), func(line string) bool {
			left, right, _ := strings.Cut(line, " - ")
			f := strings.Fields(left)
			return len(f) > 4 && f[4] == path && strings.HasPrefix(right, kind+" ")
		}) {
			t.Errorf("no %s on %s in\n%s", kind, path, mounts)
		}
	}
	if strings.Contains(mounts, " /tmp ") {
		t.Error("/tmp is not on the disk")
	}
	for path, want := range map[string]string{
		"/proc/sys/kernel/hostname": "sandbox\n",
		"/etc/hostname":             "sandbox\n",
		"/etc/resolv.conf":          "nameserver 169.254.0.22\n",
		"/sys/class/net/lo/flags":   "0x9\n", // up, loopback
		"/etc/hosts": "10.1.2.3 mine # kept\n127.0.0.1 localhost\n" + blockBegin +
			"::1\tlocalhost ip6-localhost ip6-loopback\n169.254.0.21\tsandbox\n" + blockEnd,
	} {
		if got := v.read(path); got != want {
			t.Errorf("%s reads %q, want %q", path, got, want)
		}
	}
	if got := v.run("tty", true); !strings.Contains(got, "terminal=true name=/dev/pts/0 gid=5 mode=620") {
		t.Errorf("a terminal is %q", got)
	}
	env := v.run("env", false)
	for _, bad := range []string{"BOOT_IMAGE", "LD_PRELOAD", stageEnv} {
		if strings.Contains(env, bad) {
			t.Errorf("the kernel's environment is passed on: %s", env)
		}
	}
	if !strings.Contains(env, "PATH="+searchPath+"\n") || !strings.Contains(env, "HOME=/root\n") {
		t.Errorf("the environment is %s", env)
	}
	var limit unix.Rlimit // which the machine of a test cannot raise
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if got, want := v.run("limits", false), fmt.Sprintln(min(65536, limit.Max)); got != want {
		t.Errorf("programs may open %q files, want %q", got, want)
	}
	v.run("orphans", false)
	v.eventually("all orphans are reaped", func() bool { return len(v.children()) == 0 })
}

// children lists what the machine's first process has not reaped.
func (v *vm) children() []string {
	v.t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", v.cmd.Process.Pid))
	if err != nil {
		v.t.Skip("the kernel does not list children")
	}
	return strings.Fields(string(data))
}

func (v *vm) eventually(what string, ok func() bool) {
	v.t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			v.t.Fatalf("not within 10 s: %s", what)
		}
	}
}

func TestTheHostNamesTheSandboxAndRepairsItsNetworkAfterAResume(t *testing.T) {
	t.Parallel()
	v := startVM(t, vmConfig{}).up()
	if got := post(t, v.client, guestAddr+"/init", `{"sandboxID":"i123","templateID":"t1","lifecycleID":"a","hyperloopIP":"192.0.2.1"}`); got != 204 {
		t.Fatalf("init: %d", got)
	}
	for path, want := range map[string]string{
		"/proc/sys/kernel/hostname":     "i123\n",
		"/etc/hostname":                 "i123\n",
		"/run/e2b/.E2B_SANDBOX_ID":      "i123",
		"/run/wrenn/.WRENN_SANDBOX_ID":  "i123",
		"/run/wrenn/.WRENN_TEMPLATE_ID": "t1",
		"/etc/hosts":                    "10.1.2.3 mine # kept\n127.0.0.1 localhost\n" + blockBegin + "::1\tlocalhost ip6-localhost ip6-loopback\n169.254.0.21\ti123\n192.0.2.1\tevents.e2b.local\n" + blockEnd,
	} {
		if got := v.read(path); got != want {
			t.Errorf("%s reads %q, want %q", path, got, want)
		}
	}
	ns, err := netns.GetFromPid(v.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	inside, err := netlink.NewHandleAt(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	everywhere := &netlink.Route{Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}}
	if err := inside.RouteDel(everywhere); err != nil {
		t.Fatal(err)
	}
	gateway := v.clientFrom("169.254.0.22") // on the link, needs no route
	if got := post(t, gateway, guestAddr+"/init", `{"sandboxID":"i123","lifecycleID":"a"}`); got != 204 {
		t.Fatal(got)
	}
	if routes, _ := inside.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Dst: nil}, netlink.RT_FILTER_DST); len(routes) != 0 {
		t.Errorf("the same lifecycle set the network up again: %v", routes)
	}
	if got := post(t, gateway, guestAddr+"/init", `{"sandboxID":"i123","lifecycleID":"b"}`); got != 204 {
		t.Fatal(got)
	}
	v.client.CloseIdleConnections()
	if got := v.read("/etc/hostname"); got != "i123\n" {
		t.Errorf("after the resume: %q", got)
	}
}

func TestTheKernelsCommandLineGoesBeforeTheDefaults(t *testing.T) {
	t.Parallel()
	v := startVM(t, vmConfig{
		cmdline: "console=ttyS0 wrenn.hostname=chosen wrenn.dns=192.0.2.53,2001:db8::53 wrenn.mtu=1400 wrenn.poweroff=off wrenn.nonsense=1 wrenn.ip=nowhere -- -vm wrenn.hostname=not-ours",
	}).up()
	if got := v.read("/proc/sys/kernel/hostname"); got != "chosen\n" {
		t.Errorf("hostname reads %q before the sandbox has an id", got)
	}
	post(t, v.client, guestAddr+"/init", `{"sandboxID":"i123"}`)
	for path, want := range map[string]string{
		"/proc/sys/kernel/hostname": "i123\n",
		"/etc/resolv.conf":          "nameserver 192.0.2.53\nnameserver 2001:db8::53\n",
		"/sys/class/net/eth0/mtu":   "1400\n",
	} {
		if got := v.read(path); got != want {
			t.Errorf("%s reads %q, want %q", path, got, want)
		}
	}
	if n := strings.Count(v.read("/proc/self/mountinfo"), " - proc "); n != 1 {
		t.Errorf("proc is mounted %d times", n)
	}
	resp, err := v.client.Get("http://" + guestAddr + "/logs")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, _ := bufio.NewReader(resp.Body).ReadString(0)
	for _, want := range []string{"wrenn.nonsense", "wrenn.ip"} {
		if !strings.Contains(text, want) {
			t.Errorf("the log does not tell of %s: %s", want, text)
		}
	}
	v.cmd.Process.Signal(syscall.SIGPWR)
	if how := v.down(5 * time.Second); how != syscall.SIGINT { // what the kernel makes of a power-off
		t.Errorf("it ended by %v", how)
	}
}

func TestMountsOfARealKernel(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can mount")
	}
	for _, link := range deviceLinks {
		if _, err := os.Lstat("/dev/" + link[1]); err != nil {
			t.Skip("the devices are the host's too, and would get links that it does not have")
		}
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), stageEnv+"=mounts")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC}
	out, err := cmd.Output()
	if err != nil {
		t.Skipf("cannot mount in a namespace: %v", err)
	}
	if strings.Contains(string(out), "problem:") {
		t.Errorf("%s", out)
	}
	first, rest, _ := strings.Cut(string(out), "--\n")
	if second, _, _ := strings.Cut(rest, "--\n"); second != first {
		t.Errorf("what is mounted is mounted again: first\n%sthen\n%s", first, second)
	}
	for _, want := range []string{"/tmp/proc proc", "/tmp/sys sysfs", "/tmp/dev devtmpfs", "/tmp/dev/pts devpts", "/tmp/dev/shm tmpfs", "/tmp/run tmpfs"} {
		if !strings.Contains(first, want+"\n") {
			t.Errorf("no %s in\n%s", want, first)
		}
	}
	if strings.Contains(first, "/tmp/tmp ") {
		t.Errorf("/tmp is not on the disk:\n%s", first)
	}
}
