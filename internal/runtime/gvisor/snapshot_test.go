package gvisor

import "testing"

func TestAPauseIsToldFromAGuestThatRunsByTheEnginesStacks(t *testing.T) {
	const (
		running = "goroutine 1 [select]:\ngvisor.dev/gvisor/pkg/sentry/kernel.(*Task).block(0x1)\n\t/x/task_block.go:1\n" +
			"gvisor.dev/gvisor/pkg/sentry/kernel.(*Task).run(0x1, 0x2)\n\t/x/task_run.go:1\n\n"
		stopped = "goroutine 2 [sync.Cond.Wait]:\ngvisor.dev/gvisor/pkg/sentry/kernel.(*Task).doStop(0x1)\n\t/x/task_run.go:1\n" +
			"gvisor.dev/gvisor/pkg/sentry/kernel.(*Task).run(0x1, 0x2)\n\t/x/task_run.go:1\n\n"
		other = "goroutine 3 [IO wait]:\ngvisor.dev/gvisor/pkg/unet.(*Socket).wait(0x1)\n\t/x/unet.go:1\n\n"
	)
	for name, test := range map[string]struct {
		stacks string
		want   bool
	}{
		"every task stopped":            {stopped + other + stopped, true},
		"one stopped, as by ctrl-z":     {running + stopped, false},
		"none":                          {running, false},
		"no tasks: it is just starting": {other, false},
	} {
		if got := allStopped(test.stacks); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
