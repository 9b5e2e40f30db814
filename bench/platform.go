package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/wrenn/wrenn/internal/client"
)

// Platform is the running platform that is measured. Benchmarks of it run on its
// host, as root: they look at its processes.
type Platform struct {
	Client  *client.Client
	DataURL string // base URL of its data plane, for requests with routing headers
	DataDir string
}

const runtimeName = "gvisor"

// pid is the process of the platform, as its lock file says.
func (p Platform) pid() (int, error) {
	data, err := os.ReadFile(filepath.Join(p.DataDir, "lock"))
	if err != nil {
		return 0, fmt.Errorf("find platform process: %w", err)
	}
	var lock struct {
		PID int `json:"pid"`
	}
	if err := json.Unmarshal(data, &lock); err != nil {
		return 0, fmt.Errorf("find platform process: %w", err)
	}
	return lock.PID, nil
}

// create makes a sandbox of the base template.
func (p Platform) create(ctx context.Context) (*client.Sandbox, error) {
	info, err := p.Client.Create(ctx, client.CreateRequest{TemplateID: "base", Timeout: time.Hour})
	if err != nil {
		return nil, err
	}
	return p.Client.Sandbox(info), nil
}

// firstOutput runs a command that prints and returns when its first byte of
// output is here.
func firstOutput(ctx context.Context, s *client.Sandbox, path string, args ...string) error {
	proc, err := s.Start(ctx, client.Command{Path: path, Args: args})
	if err != nil {
		return err
	}
	defer proc.Close()
	var first firstByte
	exit, err := proc.Wait(&first, &first)
	if errors.Is(err, errFirstByte) {
		return nil
	}
	return fmt.Errorf("%s printed nothing: status %d, %w", path, exit.Status(), err)
}

// firstByte is a writer that ends the copying at the first byte.
type firstByte struct{}

var errFirstByte = errors.New("first byte")

func (*firstByte) Write([]byte) (int, error) { return 0, errFirstByte }

// process is what the kernel accounts to one process.
type process struct {
	pss  int64 // bytes: own memory, and a share of what is shared
	cpu  time.Duration
	fds  int
	args []byte
}

// processesOf returns the processes of which an argument contains mark.
func processesOf(mark string) (map[int]process, error) {
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	found := make(map[int]process)
	for _, path := range paths {
		args, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(args, []byte(mark)) {
			continue // ended meanwhile, or not ours
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil || pid == os.Getpid() {
			continue
		}
		if p, err := readProcess(pid); err == nil {
			p.args = args
			found[pid] = p
		}
	}
	return found, nil
}

func readProcess(pid int) (process, error) {
	var p process
	dir := "/proc/" + strconv.Itoa(pid)
	rollup, err := os.ReadFile(dir + "/smaps_rollup")
	if err != nil {
		return p, err
	}
	p.pss, err = kib(rollup, "Pss:")
	if err != nil {
		return p, err
	}
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return p, err
	}
	// After the name, which may hold anything and ends at the last ')': state is
	// field 3, utime 14, stime 15 (proc(5)), in hundredths of a second.
	f := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	for _, i := range []int{11, 12} {
		ticks, err := strconv.ParseInt(string(f[i]), 10, 64)
		if err != nil {
			return p, err
		}
		p.cpu += time.Duration(ticks) * 10 * time.Millisecond
	}
	fds, err := os.ReadDir(dir + "/fd")
	p.fds = len(fds)
	return p, err
}

// availableMemory is the host's, in bytes.
func availableMemory() (int64, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	return kib(data, "MemAvailable:")
}

func kib(text []byte, key string) (int64, error) {
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		if f := bytes.Fields(lines.Bytes()); len(f) >= 2 && string(f[0]) == key {
			n, err := strconv.ParseInt(string(f[1]), 10, 64)
			return n << 10, err
		}
	}
	return 0, fmt.Errorf("no %q", key)
}
