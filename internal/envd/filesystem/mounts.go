package filesystem

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// mountAt returns a mount point that is path or lies below it, "" when there is
// none. Removing or moving one would empty what is mounted and then fail.
func mountAt(path string) string {
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return ""
	}
	real := filepath.Join(dir, filepath.Base(path))
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "" // the kernel will refuse it by itself, if later
	}
	return findMount(info, real)
}

func findMount(mountinfo []byte, path string) string {
	for line := range bytes.Lines(mountinfo) {
		fields := strings.Fields(string(line))
		if len(fields) < 5 {
			continue
		}
		point := unescape(fields[4])
		if point == path || strings.HasPrefix(point, strings.TrimSuffix(path, "/")+"/") {
			return point
		}
	}
	return ""
}

// unescape reads the kernel's \ooo for the characters that would break a line
// into other fields.
func unescape(s string) string {
	var b strings.Builder
	for {
		before, after, found := strings.Cut(s, `\`)
		b.WriteString(before)
		if !found {
			return b.String()
		}
		s = after
		if len(after) >= 3 {
			if c, err := strconv.ParseUint(after[:3], 8, 8); err == nil {
				b.WriteByte(byte(c))
				s = after[3:]
				continue
			}
		}
		b.WriteByte('\\')
	}
}
