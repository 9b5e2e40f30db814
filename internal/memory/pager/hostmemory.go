package pager

import (
	"bytes"
	"os"
	"strconv"
)

// hostMemory is a figure of /proc/meminfo in bytes; 0: it is not there.
func hostMemory(name string) int64 {
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	return meminfo(info, name)
}

func meminfo(info []byte, name string) int64 {
	_, rest, _ := bytes.Cut(info, []byte(name+":"))
	fields := bytes.Fields(rest[:min(len(rest), 64)])
	if len(fields) == 0 {
		return 0
	}
	kib, _ := strconv.ParseInt(string(fields[0]), 10, 64)
	return kib << 10
}

// memoryShort reports whether less than a quarter of the host's memory is available:
// it is for those then who ask for it.
func memoryShort() bool {
	info, err := os.ReadFile("/proc/meminfo")
	return err == nil && short(info)
}

func short(info []byte) bool { return meminfo(info, "MemAvailable") < meminfo(info, "MemTotal")/4 }
