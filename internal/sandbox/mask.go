package sandbox

import (
	"strconv"
	"strings"
)

// MaskPort stands for the port's number in the mask of a request host.
const MaskPort = "${PORT}"

// CheckMaskRequestHost checks a mask: a host name or address, with or without a
// port, in which MaskPort may occur. The error is of kind ErrInvalid.
func CheckMaskRequestHost(mask string) error {
	// The longest number, so that what is checked is as long as it gets.
	host := strings.ReplaceAll(mask, MaskPort, "65535")
	name, port, hasPort := host, "", false
	if address, rest, found := strings.Cut(host, "]"); found && strings.HasPrefix(address, "[") {
		name = strings.Trim(address[1:], ":")
		port, hasPort = strings.CutPrefix(rest, ":")
		if name = strings.ReplaceAll(name, ":", ""); !hasPort && rest != "" {
			name = "" // more than an address
		}
	} else {
		name, port, hasPort = strings.Cut(host, ":")
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if len(host) > 253 || name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._") != "" ||
		hasPort && (err != nil || number == 0) {
		return Errorf(ErrInvalid, "maskRequestHost %q: want HOST or HOST:PORT, in which %s stands for the port's number", clip(mask), MaskPort)
	}
	return nil
}
