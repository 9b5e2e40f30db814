package sandbox

import (
	"net/netip"
	"strconv"
	"strings"
)

// MaskPort stands for the port's number in the mask of a request host.
const MaskPort = "${PORT}"

// CheckMaskRequestHost checks a mask: a host name or address, with or without a
// port, in which MaskPort may occur. The error is of kind ErrInvalid.
func CheckMaskRequestHost(mask string) error {
	// The longest number, so that what is checked is as long as it gets.
	if host := strings.ReplaceAll(mask, MaskPort, "65535"); len(host) > 253 || !isHost(host) {
		return Errorf(ErrInvalid, "maskRequestHost %q: want HOST or HOST:PORT, in which %s stands for the port's number", clip(mask), MaskPort)
	}
	return nil
}

// isHost reports whether s is a name or address with or without a port.
func isHost(s string) bool {
	const name = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._"
	rest := strings.TrimLeft(s, name)
	if bracketed, found := strings.CutPrefix(s, "["); found {
		address, behind, closed := strings.Cut(bracketed, "]")
		if addr, err := netip.ParseAddr(address); !closed || err != nil || !addr.Is6() || addr.Zone() != "" {
			return false
		}
		rest = behind
	}
	if rest == "" {
		return s != ""
	}
	port, found := strings.CutPrefix(rest, ":")
	number, err := strconv.ParseUint(port, 10, 16)
	return found && rest != s && err == nil && number > 0
}
