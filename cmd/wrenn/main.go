// Command wrenn runs code that nobody trusts in sandboxes: it is the platform,
// its command line and, under the name of runsc, the sandbox kernel.
package main

import (
	"os"

	"github.com/wrenn/wrenn/internal/runtime/gvisor/runsc"
	"github.com/wrenn/wrenn/internal/server/xconnect"
)

func main() {
	if runsc.Invoked(os.Args[0]) {
		runsc.Main() // does not return
	}
	xconnect.Restore()
	os.Exit(execute())
}
