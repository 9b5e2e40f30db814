package reserve

import (
	"bufio"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// lockText keeps the pages of the agent's program in memory once they have been
// used. Without swap they are what a system short of memory takes away first,
// and reading them again and again from the disk is what makes a program that is
// alive answer after minutes. Pages that were never used take no memory.
func lockText() {
	own, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// "start-end perms offset device inode path"
		fields := strings.Fields(lines.Text())
		var start, end uintptr
		if len(fields) != 6 || fields[5] != own || fields[1][1] == 'w' {
			continue
		}
		if _, err := fmt.Sscanf(fields[0], "%x-%x", &start, &end); err != nil {
			continue
		}
		_, _, _ = unix.Syscall(unix.SYS_MLOCK2, start, end-start, unix.MLOCK_ONFAULT)
	}
}
