// Command program is the fake as a program of its own, for jails that have nothing else
// in them. Its name says which version it is.
package main

import (
	"os"

	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker/fake"
)

func main() { os.Exit(fake.Main()) }
