package gvisor

import (
	"fmt"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// memoryLimit is how much of the host's memory an instance may use, in bytes:
// more than the guest is shown, for the sandbox kernel, the gofer and page tables.
// So the guest can use all that it is shown.
func memoryLimit(memoryMiB int64) int64 { return (memoryMiB + 64 + memoryMiB/16) << 20 }

// liftMemory raises the limit for as long as the engine reads or writes an image.
// It needs memory then for every process, file and page list of the guest, up to a
// few times what it holds of them anyway; and the guest, which could use it up,
// does not run. An engine that runs out of memory there takes the guest with it.
func (r *Runtime) liftMemory(id sandbox.ID, memoryMiB int64) error {
	return r.set.Cgroups.LimitMemory(r.set.Group(id), 4*memoryLimit(memoryMiB))
}

// settleMemory sets the limit for a running guest. What the engine needed for an
// image it keeps for a while, and what is used cannot be taken back.
func (r *Runtime) settleMemory(id sandbox.ID, memoryMiB int64) error {
	const spare = 32 << 20
	name, limit := r.set.Group(id), memoryLimit(memoryMiB)
	used, err := r.set.Cgroups.Memory(name)
	if err != nil {
		return fmt.Errorf("limit memory: %w", err)
	}
	return r.set.Cgroups.LimitMemory(name, max(limit, used+spare))
}
