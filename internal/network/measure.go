package network

import (
	"net/netip"
	"time"
)

// measuredSlot is beyond those that pools of one tag have.
const measuredSlot = 60_000

// TimeSlot makes a slot for a virtual machine, with nothing prepared ahead, removes it
// again, and returns how long making it took. It is for benchmarks.
func TimeSlot(tag string) (took time.Duration, err error) {
	if err := checkTag(tag); err != nil {
		return 0, err
	}
	s := newSlot(tag, measuredSlot, netip.MustParseAddr("10.253.0.1"), true)
	begin := time.Now()
	if err := createSlot(tag, s, netip.MustParseAddr("10.253.0.0")); err != nil {
		return 0, err
	}
	took = time.Since(begin)
	return took, destroySlot(tag, s.Index)
}
