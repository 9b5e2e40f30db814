// Package metrics measures the sandbox from inside: processor, memory, disk.
package metrics

import (
	"bufio"
	"bytes"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Metrics is one measurement, in the form clients and the host read. Sizes are
// in bytes.
type Metrics struct {
	Timestamp   int64   `json:"ts"` // unix seconds
	CPUCount    int     `json:"cpu_count"`
	CPUUsedPct  float64 `json:"cpu_used_pct"` // since the measurement before; 100 is one CPU kept busy
	MemTotal    uint64  `json:"mem_total"`
	MemUsed     uint64  `json:"mem_used"`
	MemCache    uint64  `json:"mem_cache"`
	MemTotalMiB uint64  `json:"mem_total_mib"`
	MemUsedMiB  uint64  `json:"mem_used_mib"`
	DiskUsed    uint64  `json:"disk_used"`
	DiskTotal   uint64  `json:"disk_total"`
}

// Meter measures. What cannot be read counts as 0: an incomplete answer is
// worth more to the host than none. The zero value is ready.
type Meter struct {
	mu       sync.Mutex
	lastBusy time.Duration
	lastTime time.Time
}

// Measure takes a measurement. It reads a few small files.
func (m *Meter) Measure() Metrics {
	now := time.Now()
	result := Metrics{Timestamp: now.Unix(), CPUCount: runtime.NumCPU()}

	stat, _ := os.ReadFile("/proc/stat")
	result.CPUUsedPct = m.usage(busyTime(stat), now)

	info, _ := os.ReadFile("/proc/meminfo")
	memory := parseMeminfo(info)
	result.MemTotal, result.MemCache = memory["MemTotal"], memory["Cached"]
	available := availableMemory(memory)
	if available < result.MemTotal {
		result.MemUsed = result.MemTotal - available
	}
	if limit, used, cache, ok := readCgroup("/sys/fs/cgroup"); ok && limit < result.MemTotal {
		result.MemTotal, result.MemUsed, result.MemCache = limit, min(used, limit), min(cache, limit)
	}
	result.MemTotalMiB, result.MemUsedMiB = result.MemTotal>>20, result.MemUsed>>20

	var fs unix.Statfs_t
	if err := unix.Statfs("/", &fs); err == nil {
		result.DiskTotal = fs.Blocks * uint64(fs.Bsize)
		result.DiskUsed = (fs.Blocks - min(fs.Bavail, fs.Blocks)) * uint64(fs.Bsize)
	}
	return result
}

// usage returns per cent of one CPU used since the last call.
func (m *Meter) usage(busy time.Duration, now time.Time) float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	var pct float64
	if elapsed := now.Sub(m.lastTime); !m.lastTime.IsZero() && elapsed > 0 && busy > m.lastBusy {
		pct = 100 * float64(busy-m.lastBusy) / float64(elapsed)
	}
	m.lastBusy, m.lastTime = busy, now
	return math.Round(pct*100) / 100
}

const (
	tick     = time.Second / 100 // USER_HZ, the same on every Linux architecture we run on
	maxTicks = uint64(math.MaxInt64 / tick)
)

// busyTime reads the first line of /proc/stat: user, nice, system, idle,
// iowait, irq, softirq; what follows is not ours or counted already. Sandbox
// kernels may report only zeros.
func busyTime(stat []byte) time.Duration {
	line, _, _ := bytes.Cut(stat, []byte("\n"))
	fields := strings.Fields(string(line))
	if len(fields) < 5 || fields[0] != "cpu" {
		return 0
	}
	var ticks uint64
	for i, field := range fields[1:min(len(fields), 8)] {
		n, err := strconv.ParseUint(field, 10, 64)
		if err != nil {
			return 0
		}
		if i != 3 && i != 4 { // idle, iowait
			ticks += min(n, maxTicks)
		}
	}
	return time.Duration(min(ticks, maxTicks)) * tick
}

func availableMemory(memory map[string]uint64) uint64 {
	if available, ok := memory["MemAvailable"]; ok {
		return available
	}
	return memory["MemFree"] + memory["Buffers"] + memory["Cached"]
}

// readCgroup returns the memory limit that the sandbox was given by a cgroup,
// how much of it is used, and cached besides. Not ok where there is no limit.
func readCgroup(root string) (limit, used, cache uint64, ok bool) {
	inactive := "inactive_file"
	limit, ok = readNumber(root + "/memory.max")
	used, _ = readNumber(root + "/memory.current")
	stat, _ := os.ReadFile(root + "/memory.stat")
	if !ok { // version 1
		inactive = "total_inactive_file"
		limit, ok = readNumber(root + "/memory/memory.limit_in_bytes")
		used, _ = readNumber(root + "/memory/memory.usage_in_bytes")
		stat, _ = os.ReadFile(root + "/memory/memory.stat")
	}
	for line := range strings.Lines(string(stat)) {
		if name, value, _ := strings.Cut(strings.TrimSpace(line), " "); name == inactive {
			cache, _ = strconv.ParseUint(value, 10, 64)
		}
	}
	cache = min(cache, used)
	return limit, used - cache, cache, ok && limit > 0
}

func readNumber(path string) (uint64, bool) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	return n, err == nil
}

func parseMeminfo(info []byte) map[string]uint64 {
	values := make(map[string]uint64)
	for lines := bufio.NewScanner(bytes.NewReader(info)); lines.Scan(); {
		name, rest, ok := strings.Cut(lines.Text(), ":")
		if !ok {
			continue
		}
		number, unit, _ := strings.Cut(strings.TrimSpace(rest), " ")
		n, err := strconv.ParseUint(number, 10, 64)
		if err != nil {
			continue
		}
		if unit == "kB" {
			n = min(n, math.MaxUint64>>10) << 10
		}
		values[name] = n
	}
	return values
}
