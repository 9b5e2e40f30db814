package doctor

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// archiveKeyring is what debootstrap checks the distribution's packages with.
const archiveKeyring = "usr/share/keyrings/debian-archive-keyring.gpg"

func (h host) debootstrap() Result {
	const name = "debootstrap"
	path, err := exec.LookPath("debootstrap")
	if err != nil {
		return fail(name, "apt-get install debootstrap", "not installed: the base template cannot be built")
	}
	if !h.exists(archiveKeyring) {
		return fail(name, "apt-get install debian-archive-keyring", "/%s is missing: packages could not be verified", archiveKeyring)
	}
	return ok(name, "%s", path)
}

func disk(dir string) Result {
	const name = "disk"
	const remedy = "free some space, or choose a data directory on another disk with --data"
	var st unix.Statfs_t
	at := filepath.Clean(dir)
	for { // the nearest directory that exists
		err := unix.Statfs(at, &st)
		if err == nil {
			break
		}
		if at == filepath.Dir(at) {
			return fail(name, remedy, "cannot look at %s: %v", dir, err)
		}
		at = filepath.Dir(at)
	}
	free := int64(st.Bavail) * st.Bsize >> 20
	switch {
	case st.Flags&unix.ST_RDONLY != 0:
		return fail(name, remedy, "%s is on a read-only file system", dir)
	case free < 2<<10:
		return fail(name, remedy, "%d MiB free for %s; the base template alone needs 2048", free, dir)
	case st.Files > 0 && st.Ffree < 100_000:
		return fail(name, "remove files, or choose a data directory on another disk with --data", "%d inodes free for %s; the base template needs 100000", st.Ffree, dir)
	case free < 10<<10:
		return warn(name, remedy, "%d MiB free for %s; one sandbox may write 10240", free, dir)
	}
	return ok(name, "%d GiB free for %s", free>>10, dir)
}

func (h host) memory() Result {
	const name = "memory"
	const remedy = "end other programs, or use a larger host"
	total, available := h.meminfo("MemTotal:"), h.meminfo("MemAvailable:")
	switch {
	case available == 0:
		return warn(name, "mount /proc", "cannot tell how much is available")
	case available < 256:
		return fail(name, remedy, "%d MiB available; the platform and one sandbox need 256", available)
	case available < 1024:
		return warn(name, remedy, "%d MiB available: room for few sandboxes", available)
	}
	return ok(name, "%d of %d MiB available", available, total)
}

// meminfo returns a field of /proc/meminfo in MiB.
func (h host) meminfo(field string) int64 {
	for line := range strings.Lines(h.read("proc/meminfo")) {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == field {
			kib, _ := strconv.ParseInt(f[1], 10, 64)
			return kib >> 10
		}
	}
	return 0
}

// openFiles looks at the hard limit: a Go program raises the soft one itself.
func openFiles() Result {
	const name = "open files"
	const want = 65536
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return warn(name, "look at ulimit -Hn", "cannot tell the limit: %v", err)
	}
	if l.Max < want {
		return warn(name, "ulimit -Hn "+strconv.Itoa(want)+" (LimitNOFILE= in a systemd unit)",
			"at most %d per process; that is little for hundreds of sandboxes", l.Max)
	}
	return ok(name, "up to %d per process", l.Max)
}

// timeError is what adjtimex(2) returns when the clock is not synchronised.
const timeError = 5

func clock() Result {
	const name = "clock"
	const remedy = "set the clock and keep it right: timedatectl set-ntp true, or chrony"
	if self, err := os.Executable(); err == nil {
		if fi, err := os.Stat(self); err == nil && fi.ModTime().After(time.Now().Add(time.Hour)) {
			return fail(name, remedy, "it says %s, which is before this program was built: certificates would not be valid", time.Now().UTC().Format(time.RFC3339))
		}
	}
	state, err := unix.Adjtimex(&unix.Timex{})
	if err == nil && state == timeError {
		return warn(name, remedy, "%s; the kernel is not told that it is kept right", time.Now().UTC().Format(time.RFC3339))
	}
	return ok(name, "%s", time.Now().UTC().Format(time.RFC3339))
}
