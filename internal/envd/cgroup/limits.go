package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// agentWeight is the agent's share of a busy processor beside 100 of the user.
	agentWeight = "10000"
	// agentMemory is what is never taken from the agent when memory runs short, in
	// bytes.
	agentMemory = 64 << 20
	// agentTasks is how many processes and threads are kept from the user at least.
	agentTasks = 256
)

// limit puts the agent into its group and sets the limits, as far as the
// hierarchy has controllers. Only what the groups cannot do without is an error.
func limit(root string) error {
	agent, users := filepath.Join(root, "agent"), filepath.Join(root, "user")
	if err := write(agent, "cgroup.procs", strconv.Itoa(os.Getpid())); err != nil {
		return fmt.Errorf("move the agent to its cgroup: %w", err)
	}
	available, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("list cgroup controllers: %w", err)
	}
	var total uint64 // bytes
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		total = uint64(info.Totalram) * uint64(info.Unit)
	}
	for controller := range strings.FieldsSeq(string(available)) {
		if !slices.Contains([]string{"cpu", "memory", "pids"}, controller) ||
			write(root, "cgroup.subtree_control", "+"+controller) != nil {
			continue
		}
		switch controller {
		case "cpu":
			_ = write(agent, "cpu.weight", agentWeight)
		case "memory":
			_ = write(agent, "memory.min", strconv.FormatUint(min(agentMemory, total/8), 10))
		case "pids":
			_ = write(users, "pids.max", strconv.Itoa(maxTasks()))
		}
	}
	return nil
}

// maxTasks returns how many processes and threads the user may have, so that the
// agent can always make some.
func maxTasks() int {
	most := 1 << 15
	for _, name := range []string{"pid_max", "threads-max"} {
		data, err := os.ReadFile("/proc/sys/kernel/" + name)
		if n, bad := strconv.Atoi(strings.TrimSpace(string(data))); err == nil && bad == nil && n > 0 {
			most = min(most, n)
		}
	}
	return max(most-max(most/10, agentTasks), most/2)
}

func write(dir, name, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(value)
	return err
}
