package agent

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
)

// availableMemory is what the kernel would give to new programs without
// swapping, in bytes.
func availableMemory() (int64, error) { return meminfo("MemAvailable:") }

func totalMemory() (int64, error) { return meminfo("MemTotal:") }

func meminfo(key string) (int64, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("read memory: %w", err)
	}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		f := bytes.Fields(lines.Bytes())
		if len(f) >= 2 && string(f[0]) == key {
			kib, err := strconv.ParseInt(string(f[1]), 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("no " + key + " in /proc/meminfo")
}
