package memory

import "bytes"

var zeroBlock [BlockSize]byte

// isZero says whether a block is all zero. Most that are not show it at once.
func isZero(block []byte) bool {
	if block[0] != 0 || block[len(block)-1] != 0 {
		return false
	}
	return bytes.Equal(block, zeroBlock[:])
}

// CountZero is how many blocks of p are all zero; p is of whole blocks.
func CountZero(p []byte) int {
	n := 0
	for ; len(p) > 0; p = p[BlockSize:] {
		if isZero(p[:BlockSize]) {
			n++
		}
	}
	return n
}
