// Command runsc is what tests execute as runsc: a test binary itself will not
// do, because with the race detector it is not static.
package main

import "github.com/wrenn/wrenn/internal/runtime/gvisor/runsc"

func main() { runsc.Main() }
