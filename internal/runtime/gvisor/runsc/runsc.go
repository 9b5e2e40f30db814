// Package runsc is gVisor's command line inside this binary. It is the only
// package that imports gVisor: the host agent uses gVisor by executing a copy of
// its own binary under the name of runsc, never by calling into it.
package runsc

import (
	"path/filepath"
	"strings"

	"gvisor.dev/gvisor/runsc/cli/maincli"
)

// Invoked reports whether a program started as argv0 is to be runsc. runsc
// executes itself again through /proc/self/exe, with "exe" as its name.
func Invoked(argv0 string) bool {
	base := filepath.Base(argv0)
	return base == "exe" || strings.HasPrefix(base, "runsc")
}

// Main is runsc's main function; it ends the process.
func Main() { maincli.Main() }
