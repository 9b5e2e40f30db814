package cgroup

import (
	"bytes"
	"strconv"
	"strings"
)

// mountOf finds the writable cgroup2 mount among the lines of /proc/mounts.
func mountOf(mounts string) (string, error) {
	for line := range strings.Lines(mounts) {
		// what, where, type, options; spaces in names are written \040
		fields := strings.Fields(line)
		if len(fields) >= 4 && fields[2] == "cgroup2" && !strings.Contains(fields[1], `\`) &&
			strings.HasPrefix(fields[3]+",", "rw,") {
			return fields[1], nil
		}
	}
	return "", ErrNone
}

// unpopulated reports whether a group's cgroup.events say that nobody is in it.
func unpopulated(events []byte) bool {
	for line := range bytes.Lines(events) {
		if bytes.Equal(bytes.TrimSpace(line), []byte("populated 0")) {
			return true
		}
	}
	return false
}

// numbers returns the numbers of a file that has one a line.
func numbers(data []byte) []int {
	var list []int
	for field := range bytes.FieldsSeq(data) {
		if n, err := strconv.Atoi(string(field)); err == nil {
			list = append(list, n)
		}
	}
	return list
}
