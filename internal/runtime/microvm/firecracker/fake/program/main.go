// Command program is the fake as a program of its own, for jails that have nothing else
// in them, and its jailer. Its name says which of them it is, and of which version.
package main

import (
	"os"

	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker/fake"
)

func main() {
	if fake.IsJailer() {
		os.Exit(fake.Jailer())
	}
	os.Exit(fake.Main())
}
