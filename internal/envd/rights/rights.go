// Package rights keeps rights that the agent needs from the programs it starts.
package rights

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// Withhold keeps capabilities to this process: what it starts from now on does
// not get them, whoever it runs as.
func Withhold(capabilities ...uintptr) error {
	for _, c := range capabilities {
		has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if err != nil || has == 0 {
			continue
		}
		// The set is each thread's own.
		if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0); errno != 0 {
			return fmt.Errorf("keep capability %d to the agent: %w", c, errno)
		}
	}
	return nil
}
