package forward

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// WithholdRules keeps the right to change packet rules to this process: what it
// starts from now on does not get it, whoever it runs as.
func WithholdRules() error {
	has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, unix.CAP_NET_ADMIN, 0, 0, 0)
	if err != nil || has == 0 {
		return nil
	}
	// The set is each thread's own.
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, unix.CAP_NET_ADMIN, 0); errno != 0 {
		return fmt.Errorf("keep the right to change packet rules: %w", errno)
	}
	return nil
}
