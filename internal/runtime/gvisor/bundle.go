package gvisor

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// The files of an instance in its directory. The overlay's upper layer is there
// as well, as a file without a name.
const (
	specFile   = "config.json" // the OCI bundle; runsc fixes the name
	upperFile  = "upper.tar"   // what the root filesystem has beyond the template's from the start
	logFile    = "runsc.log"   // fatal errors of runsc's own
	panicFile  = "panic.log"   // a crash of the sandbox kernel
	pidFile    = "pid"
	pausedFile = "paused" // there while the guest may be paused
	heldImage  = "image"  // directory with an image that is being loaded
)

var instanceFiles = []string{specFile, upperFile, logFile, panicFile, pidFile, pausedFile}

// capabilities are what container engines commonly grant: enough for sudo, apt
// and ping. They count only inside the sandbox kernel. The guest agent keeps
// CAP_NET_ADMIN, with which it forwards ports, and CAP_SYS_ADMIN, with which it
// changes the hostname, to itself.
var capabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID",
	"CAP_KILL", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP",
	"CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT",
}

// writeBundle writes into cfg.Dir what runsc makes the instance from. Without
// layer the root filesystem's changes are those of an image.
func writeBundle(cfg runtime.Config, cgroup string, layer bool) error {
	s := bundleSpec(cfg, cgroup)
	if layer {
		s.Annotations = map[string]string{"dev.gvisor.tar.rootfs.upper": filepath.Join(workingDir, upperFile)}
	}
	spec, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	if err := os.WriteFile(filepath.Join(cfg.Dir, specFile), spec, 0o600); err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	if !layer {
		return nil
	}
	upper, err := upperLayer(cfg.Hostname)
	if err != nil {
		return fmt.Errorf("write upper layer: %w", err)
	}
	if err := os.WriteFile(filepath.Join(cfg.Dir, upperFile), upper, 0o600); err != nil {
		return fmt.Errorf("write upper layer: %w", err)
	}
	return nil
}

func bundleSpec(cfg runtime.Config, cgroup string) *specs.Spec {
	const cpuPeriod = 100_000 // microseconds
	var (
		memory = cfg.Resources.MemoryMiB << 20
		quota  = int64(cfg.Resources.CPUs) * cpuPeriod
		period = uint64(cpuPeriod)
		oom    = 500 // when the whole host is short of memory, a sandbox goes before the platform
	)
	return &specs.Spec{
		Version:  specs.Version,
		Hostname: cfg.Hostname,
		Root:     &specs.Root{Path: cfg.RootFS},
		Process: &specs.Process{
			Args: append([]string{runtime.GuestInitPath}, cfg.InitArgs...),
			Cwd:  "/",
			Env: []string{
				"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root",
				"ENVD_MAX_TASKS=" + strconv.FormatInt(maxTasks(cfg.Resources), 10),
				"ENVD_KILL_WHEN_OUT_OF_MEMORY=1",
			},
			Capabilities: &specs.LinuxCapabilities{
				Bounding: capabilities, Effective: capabilities, Permitted: capabilities,
			},
			// The soft limit is lower because programs that close every
			// descriptor up to it would take seconds.
			Rlimits:     []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 65_536, Hard: 1_048_576}},
			OOMScoreAdj: &oom,
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", fmt.Sprintf("size=%dm", max(cfg.Resources.MemoryMiB/2, 1))}},
			{Destination: runtime.GuestInitPath, Type: "bind", Source: cfg.GuestInit, Options: []string{"bind", "ro"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: cgroup,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
				{Type: specs.NetworkNamespace, Path: cfg.Slot.InnerNetNS},
			},
			Resources: &specs.LinuxResources{
				Memory: &specs.LinuxMemory{Limit: &memory}, // the guest is shown this much; raised once it runs
				CPU:    &specs.LinuxCPU{Quota: &quota, Period: &period},
				Pids:   &specs.LinuxPids{Limit: cfg.Resources.PIDs},
			},
		},
	}
}

// maxTasks is how many processes and threads the guest may have. Each process
// takes up to four tasks of the host, and about a MiB of memory when it has done
// nothing but fork; beyond either limit the sandbox ends as a whole, which a
// program that forks without end must not bring about.
func maxTasks(r sandbox.Resources) int64 { return max(min(r.PIDs/4, r.MemoryMiB*3/4), 64) }

// upperLayer is a tar archive of what differs between instances of a template.
// As part of the overlay these are ordinary files: programs in the guest can
// write and replace them, which they could not with bind mounts.
func upperLayer(hostname string) ([]byte, error) {
	if hostname == "" {
		hostname = "localhost"
	}
	hosts := fmt.Sprintf("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n%s\t%s\n", network.GuestAddr, hostname)
	entries := []struct {
		name, content string
		mode          int64
	}{
		{"./", "", 0o755}, // runsc wants the root itself and names that start at it
		{"./etc/", "", 0o755},
		{"./etc/resolv.conf", fmt.Sprintf("nameserver %s\n", network.GatewayAddr), 0o644},
		{"./etc/hosts", hosts, 0o644},
		{"./etc/hostname", hostname + "\n", 0o644},
		// runsc mounts a tmpfs, taken from the guest's memory, on a /tmp that is
		// empty. With a directory that programs expect there anyway it is not.
		{"./tmp/", "", 0o1777},
		{"./tmp/.X11-unix/", "", 0o1777},
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Mode: e.mode, Size: int64(len(e.content)), Typeflag: tar.TypeReg, ModTime: time.Now()}
		if e.name[len(e.name)-1] == '/' {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write([]byte(e.content)); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// workingDir is where runsc is executed, the instance's directory, by a name without
// anything that has a meaning in a flag, whatever the data directory is called.
const workingDir = "/proc/self/cwd"

// engineFlags are runsc's flags for an instance: the same for every command on it.
func engineFlags(root, dir string, diskMiB int64) []string {
	return slices.Concat(commonFlags(root), []string{
		"--log=" + filepath.Join(dir, logFile),
		"--panic-log=" + filepath.Join(workingDir, panicFile), // it replaces %COMMAND% and the like
		fmt.Sprintf("--overlay2=root:dir=%s,size=%dm", workingDir, diskMiB),
		"--network=sandbox",
		"--allow-rootfs-tar-annotation",
		"--restore-spec-validation=ignore", // paths differ, and a later version's bundle may
	})
}

func commonFlags(root string) []string {
	return []string{
		"--root=" + root,
		"--platform=systrap",
		"--directfs=true",                // files are opened without asking the gofer each time; see docs/security.md
		"--file-access-mounts=exclusive", // the one mount is the guest agent, which never changes
		"--in-sandbox-cgroup=v2",         // with which the guest agent limits and ends what it starts
		"--allow-suid",                   // sudo
		"--net-raw",                      // ping
	}
}
