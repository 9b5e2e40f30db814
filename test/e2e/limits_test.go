package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// smallPlatform starts one whose sandboxes have little of everything.
func smallPlatform(t *testing.T) *platform {
	t.Helper()
	p := newPlatform(t)
	p.adjustBase(suite.base.RootFS, map[string]any{"cpus": 1, "memoryMiB": 256, "diskMiB": 64})
	p.start()
	return p
}

// stillWorks checks that a sandbox was not harmed by what a neighbour did.
func (b *box) stillWorks() {
	b.p.t.Helper()
	begin := time.Now()
	if got := b.run("echo fine"); got != "fine\n" {
		b.p.t.Errorf("the neighbour says %q", got)
	}
	if took := time.Since(begin); took > 10*time.Second {
		b.p.t.Errorf("the neighbour took %s to answer", took)
	}
}

// The guest agent ends what uses most memory before it comes to this; what the
// agent cannot see coming it cannot prevent.
func TestExceedingMemoryEndsTheSandboxWithAReason(t *testing.T) {
	t.Parallel()
	p := smallPlatform(t)
	neighbour, b := p.create(nil), p.create(nil)
	for _, group := range cgroupsNamed(t, b.instance) {
		for _, file := range []string{"memory.limit_in_bytes", "memory.max"} {
			path := filepath.Join(strings.TrimPrefix(group, "cgroup "), file)
			if _, err := os.Stat(path); err != nil {
				continue
			}
			if err := os.WriteFile(path, []byte("134217728"), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	hog := b.background(`exec python3 -c 'import time
a = []
while True: a.append(b"x" * (8 << 20))'`, false)
	if err := hog.end(60 * time.Second); err == nil {
		t.Errorf("the process ended, but the sandbox should have; it said %q", hog.output())
	}
	message := b.gone(t, 10*time.Second)
	if !strings.Contains(message, "memory") {
		t.Errorf("GET answers %s; want the reason, memory", message)
	}
	status, logs := p.api("GET", "/v2/sandboxes/"+b.id+"/logs", nil)
	if status != 200 || !strings.Contains(string(logs), "memory") {
		t.Errorf("logs: %d %s; want the reason, memory", status, logs)
	}
	eventually(t, 5*time.Second, "nothing is left", nothingLeft(t, b))
	neighbour.stillWorks()
}

func TestMemoryWithinTheLimitCanBeUsed(t *testing.T) {
	t.Parallel()
	p := smallPlatform(t)
	b := p.create(nil)
	if got := b.run(`python3 -c 'a = b"x" * (128 << 20); print(len(a))'`); got != "134217728\n" {
		t.Errorf("got %q", got)
	}
	total := strings.Fields(b.run("grep MemTotal /proc/meminfo"))[1]
	if kib, err := strconv.Atoi(total); err != nil || kib < 200<<10 || kib > 300<<10 {
		t.Errorf("the sandbox sees %s KiB of memory, want about 256 MiB", total)
	}
}

func TestFullDiskGivesENOSPCInside(t *testing.T) {
	t.Parallel()
	p := smallPlatform(t)
	neighbour, b := p.create(nil), p.create(nil)
	r := b.try("dd if=/dev/zero of=/root/big bs=1M count=200")
	if r.err != nil || r.exit == 0 || !strings.Contains(r.stderr, "No space left on device") {
		t.Errorf("writing 200 MB to a disk of 64 MiB: %s", r)
	}
	b.run("rm /root/big && echo ok > /root/small && cat /root/small")
	neighbour.stillWorks()
}

func TestForkBombHarmsNobodyElse(t *testing.T) {
	t.Parallel()
	p := smallPlatform(t)
	neighbour, b := p.create(nil), p.create(nil)
	bomb := b.background(`echo armed; f() { f | f & }; f; sleep 20`, false)
	bomb.says("armed")
	for range 5 {
		neighbour.stillWorks()
	}
	// The limit holds on the host too: the sandbox's cgroups have few tasks.
	for _, group := range cgroupsNamed(t, b.instance) {
		tasks, err := os.ReadFile(strings.TrimPrefix(group, "cgroup ") + "/cgroup.procs")
		if err == nil && strings.Count(string(tasks), "\n") > 1000 {
			t.Errorf("%s has %d processes", group, strings.Count(string(tasks), "\n"))
		}
	}
	b.kill()
	if err := nothingLeft(t, b)(); err != nil {
		t.Errorf("left after kill: %v", err)
	}
	neighbour.stillWorks()
}

func TestKilledSandboxKernelIsNoticedAndHarmsNobodyElse(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	neighbour, b := p.create(nil), p.create(nil)
	stream := b.background("sleep 1000", false)
	if err := syscall.Kill(sentryOf(t, p, b.instance), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	message := b.gone(t, 5*time.Second)
	var shape struct {
		Code    int
		Message string
	}
	if json.Unmarshal([]byte(message), &shape) != nil || shape.Code != 404 || !strings.Contains(shape.Message, "kill") {
		t.Errorf("GET answers %s; want code 404 and a reason that says it was killed", message)
	}
	if err := stream.end(5 * time.Second); err == nil {
		t.Error("the stream of a process ended as if the process had")
	}
	if status, body := b.fetch(8000, "/"); status != 502 {
		t.Errorf("data plane: %d %s", status, body)
	}
	eventually(t, 5*time.Second, "nothing is left", nothingLeft(t, b))
	neighbour.stillWorks()
}

// sentryOf returns the process that is a sandbox's kernel.
func sentryOf(t testing.TB, p *platform, id string) int {
	t.Helper()
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline") // fails only for a bad pattern
	for _, path := range paths {
		data, _ := os.ReadFile(path) // the process may have ended
		args := strings.Split(string(data), "\x00")
		if strings.HasPrefix(args[0], "runsc-sandbox") && strings.Contains(string(data), id) && strings.Contains(string(data), p.dir) {
			pid, _ := strconv.Atoi(strings.Split(path, "/")[2])
			return pid
		}
	}
	t.Fatalf("no sandbox kernel of %s among:\n%s", id, strings.Join(processesOf(t, id, id), "\n"))
	return 0
}

func TestLimitsAreThoseOfTheTemplate(t *testing.T) {
	t.Parallel()
	p := smallPlatform(t)
	b := p.create(nil)
	status, body := p.api("GET", "/sandboxes/"+b.id, nil)
	var detail struct{ CPUCount, MemoryMB, DiskSizeMB int }
	if err := json.Unmarshal(body, &detail); err != nil || status != 200 {
		t.Fatalf("%d %s", status, body)
	}
	if got := fmt.Sprint(detail.CPUCount, detail.MemoryMB, detail.DiskSizeMB); got != "1 256 64" {
		t.Errorf("cpus, memory and disk are %s", got)
	}
	// The sandbox may be shown more CPUs than it can use; what counts is the quota.
	quota := ""
	for _, group := range cgroupsNamed(t, b.instance) {
		for _, file := range []string{"cpu.cfs_quota_us", "cpu.max"} {
			if data, err := os.ReadFile(filepath.Join(strings.TrimPrefix(group, "cgroup "), file)); err == nil {
				quota = strings.Fields(string(data))[0]
			}
		}
	}
	if quota != "100000" {
		t.Errorf("the host's CPU quota is %q microseconds in 100000, want all of one CPU", quota)
	}
}
