package sandbox

import (
	"crypto/rand"
	"strings"
)

// IDLength is the length of every sandbox id. All ids have one length because
// runsc accepts unambiguous prefixes of a container id, so an id that is a
// prefix of another would name the wrong sandbox.
const IDLength = 20

const idAlphabet = "abcdefghijklmnopqrstuvwxyz0123456789"

// ID names a sandbox: IDLength characters of [a-z0-9], so that it can stand in
// a host name label ("{port}-{id}.{domain}") and in a file name.
type ID string

// NewID returns a fresh random id (about 103 bits).
func NewID() ID {
	// Bytes at or above the largest multiple of 36 are drawn again: taking them
	// modulo 36 would favour the first letters.
	const limit = 256 - 256%len(idAlphabet)
	id := make([]byte, 0, IDLength)
	buf := make([]byte, 2*IDLength)
	for len(id) < IDLength {
		rand.Read(buf) // never fails: crypto/rand aborts the program instead
		for _, b := range buf {
			if int(b) < limit && len(id) < IDLength {
				id = append(id, idAlphabet[int(b)%len(idAlphabet)])
			}
		}
	}
	return ID(id)
}

// ParseID checks that s has the form of a sandbox id. The error is of kind
// ErrInvalid.
func ParseID(s string) (ID, error) {
	if len(s) != IDLength || strings.Trim(s, idAlphabet) != "" {
		return "", Errorf(ErrInvalid, "%q is not a sandbox id: want %d characters of a-z and 0-9", clip(s), IDLength)
	}
	return ID(s), nil
}

// clip keeps hostile input short in messages.
func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}
