// Package keepalive says how often a silent stream must show that it is alive.
package keepalive

import (
	"context"
	"strconv"
	"time"

	"connectrpc.com/connect"
)

const (
	header   = "Keepalive-Ping-Interval" // whole seconds
	standard = 90 * time.Second
	longest  = 24 * time.Hour
)

// Interval returns how long the stream that ctx belongs to may be silent: what
// its client asked for, or 90 s.
func Interval(ctx context.Context) time.Duration {
	info, ok := connect.CallInfoForHandlerContext(ctx)
	if !ok {
		return standard
	}
	n, err := strconv.Atoi(info.RequestHeader().Get(header))
	if err != nil || n <= 0 {
		return standard
	}
	return time.Duration(min(n, int(longest/time.Second))) * time.Second
}
