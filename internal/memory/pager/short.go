package pager

import (
	"bytes"
	"os"
	"strconv"
)

// memoryShort reports whether less than a quarter of the host's memory is available:
// it is for those then who ask for it.
func memoryShort() bool {
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return false
	}
	return short(info)
}

func short(meminfo []byte) bool {
	kib := func(name string) int64 {
		_, rest, _ := bytes.Cut(meminfo, []byte(name+":"))
		fields := bytes.Fields(rest[:min(len(rest), 64)])
		if len(fields) == 0 {
			return 0
		}
		n, _ := strconv.ParseInt(string(fields[0]), 10, 64)
		return n
	}
	return kib("MemAvailable") < kib("MemTotal")/4
}
