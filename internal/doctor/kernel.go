package doctor

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

func root() Result {
	const name = "root"
	if uid := os.Geteuid(); uid != 0 {
		return fail(name, "run it with sudo", "this is user %d; namespaces, cgroups and network links need root", uid)
	}
	return ok(name, "running as root")
}

func (h host) architecture() Result {
	const name = "architecture"
	if runtime.GOARCH != "amd64" && runtime.GOARCH != "arm64" {
		return fail(name, "use an amd64 or arm64 host", "the sandbox kernel does not run on %s", runtime.GOARCH)
	}
	return ok(name, "%s, %d CPUs", runtime.GOARCH, runtime.NumCPU())
}

// The oldest kernel that the sandbox kernel's makers support.
const minMajor, minMinor = 4, 15

func (h host) kernel() Result {
	const name = "kernel"
	release := h.read("proc/sys/kernel/osrelease")
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return warn(name, "mount /proc", "cannot tell the kernel's version from %q", release)
	}
	if major < minMajor || major == minMajor && minor < minMinor {
		return fail(name, fmt.Sprintf("use a kernel from %d.%d on", minMajor, minMinor), "Linux %s is too old", release)
	}
	return ok(name, "Linux %s", release)
}

func (h host) seccomp() Result {
	const name = "seccomp"
	actions := strings.Fields(h.read("proc/sys/kernel/seccomp/actions_avail"))
	for _, want := range []string{"trap", "trace"} {
		if !slices.Contains(actions, want) {
			return fail(name, "use a kernel with CONFIG_SECCOMP_FILTER, or allow seccomp in the container that this runs in",
				"the kernel lacks the seccomp action %q, by which system calls of sandboxes are caught", want)
		}
	}
	return ok(name, "system calls can be caught")
}

func (h host) ptrace() Result {
	const name = "ptrace"
	if h.read("proc/sys/kernel/yama/ptrace_scope") == "3" {
		return fail(name, "set kernel.yama.ptrace_scope to 2 or less and reboot (3 cannot be lowered while running)",
			"kernel.yama.ptrace_scope is 3: nobody may trace a process, and the sandbox kernel must")
	}
	return ok(name, "allowed for root")
}

// namespaces looks for the kinds of namespace that sandboxes are made of; whether
// this process may make them, the network check tries.
func (h host) namespaces() Result {
	const name = "namespaces"
	var missing []string
	for _, kind := range []string{"ipc", "mnt", "net", "pid", "user", "uts"} {
		if !h.exists("proc/self/ns/" + kind) {
			missing = append(missing, kind)
		}
	}
	if len(missing) > 0 {
		return fail(name, "use a kernel built with them", "the kernel lacks %s namespaces", strings.Join(missing, ", "))
	}
	if n, err := strconv.Atoi(h.read("proc/sys/user/max_user_namespaces")); err == nil && n == 0 {
		return fail(name, "sysctl -w user.max_user_namespaces=15000", "user.max_user_namespaces is 0: sandboxes cannot get a user namespace")
	}
	return ok(name, "all there")
}

// controllers are the cgroup controllers that hold a sandbox to its limits.
var controllers = []string{"cpu", "memory", "pids"}

func (h host) cgroups() Result {
	const name = "cgroups"
	const remedy = "mount the cgroup file systems with these controllers (systemd does); on old Raspberry Pi and Debian kernels add cgroup_enable=memory to the kernel's command line"
	mounts, err := parseMounts(h.read("proc/self/mountinfo"))
	if err != nil {
		return fail(name, "mount /proc", "cannot read the mounts: %v", err)
	}
	have := map[string]bool{}
	version, readOnly := "v1", ""
	for _, m := range mounts {
		switch m.fs {
		case "cgroup2":
			// Beside v1 hierarchies it has no controllers, unless they are here.
			for _, c := range strings.Fields(h.read(m.at + "/cgroup.controllers")) {
				have[c] = true
				if c == "memory" {
					version = "v2"
				}
				if m.readOnly && slices.Contains(controllers, c) {
					readOnly = m.at
				}
			}
		case "cgroup":
			for _, c := range m.options {
				have[c] = true
				if m.readOnly && slices.Contains(controllers, c) {
					readOnly = m.at
				}
			}
		}
	}
	var missing []string
	for _, c := range controllers {
		if !have[c] {
			missing = append(missing, c)
		}
	}
	if len(missing) > 0 {
		return fail(name, remedy, "missing controllers: %s", strings.Join(missing, ", "))
	}
	if readOnly != "" {
		return fail(name, "mount it read-write; in a container, run that with its own writable cgroups", "%s is mounted read-only", readOnly)
	}
	return ok(name, "%s with %s", version, strings.Join(controllers, ", "))
}

type mountPoint struct {
	at, fs   string
	readOnly bool
	options  []string // of the file system
}

// parseMounts reads the format of /proc/self/mountinfo, proc(5).
func parseMounts(text string) ([]mountPoint, error) {
	var mounts []mountPoint
	for line := range strings.Lines(text) {
		before, after, found := strings.Cut(strings.TrimSpace(line), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !found || len(left) < 6 || len(right) < 3 {
			return nil, fmt.Errorf("line %q is not a mount", line)
		}
		mounts = append(mounts, mountPoint{
			at: left[4], fs: right[0],
			readOnly: slices.Contains(strings.Split(left[5], ","), "ro"),
			options:  strings.Split(right[2], ","),
		})
	}
	if len(mounts) == 0 {
		return nil, fmt.Errorf("no mounts")
	}
	return mounts, nil
}
