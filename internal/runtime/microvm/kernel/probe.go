package kernel

import "strings"

// ProbeArgs is the command line of a machine that is only to show that a monitor
// boots Linux on this host: it needs no disk and no network, says so on its console
// and ends. Booted tells by what it said.
func ProbeArgs() string { return strings.Join(Args(), " ") + " -- probe" }

// Booted reports whether the machine of ProbeArgs came as far as its first program.
func Booted(console string) bool {
	return strings.Contains(console, "guestboot: the machine cannot start: it was only tried")
}
