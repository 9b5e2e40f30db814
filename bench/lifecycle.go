package bench

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// Lifecycle measures what a sandbox's life costs from outside: creating one and
// getting the first output of a command, running a command in one that is
// there, killing it. The floor of creating is bare runsc with the same template
// and guest agent, taken in turn with it.
func Lifecycle(ctx context.Context, p Platform, n int) (_ Report, err error) {
	r := Report{Bench: "lifecycle", Host: thisHost(runtimeName)}
	f, err := newFloor(ctx, p.DataDir)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, f.close(context.WithoutCancel(ctx))) }()

	var bare, toOutput, create, firstExec, exec, login, kill samples
	const warmUp = 3
	for i := range n + warmUp {
		floorTook, err := f.measure(ctx, string(sandbox.NewID()))
		if err != nil {
			return r, fmt.Errorf("measure floor: %w", err)
		}
		var run lifecycleRun
		if err := run.measure(ctx, p); err != nil {
			return r, err
		}
		if i < warmUp {
			continue
		}
		bare.addMillis(floorTook)
		create.addMillis(run.create)
		firstExec.addMillis(run.firstExec)
		toOutput.addMillis(run.create + run.firstExec)
		exec.addMillis(run.exec)
		login.addMillis(run.login)
		kill.addMillis(run.kill)
		if i%10 == 0 {
			progress("lifecycle: %d of %d", i-warmUp+1, n)
		}
	}
	r.Results = []Result{
		toOutput.result("create to first output", "ms").against(bare, 1.25).
			noted("POST /v2/sandboxes, then /bin/echo; floor: bare runsc create + start to the guest agent's first answer"),
		create.result("create", "ms").against(bare, 1.25),
		firstExec.result("first exec in a new sandbox", "ms"),
		exec.result("exec to first output", "ms").noted("/bin/echo"),
		login.result("login shell to first output", "ms").noted("/bin/bash -l -c echo, as E2B's commands.run"),
		kill.result("kill", "ms").noted("until everything is freed"),
		bare.result("floor: bare runsc", "ms"),
	}
	return r, nil
}

// lifecycleRun is one sandbox's life.
type lifecycleRun struct{ create, firstExec, exec, login, kill time.Duration }

func (r *lifecycleRun) measure(ctx context.Context, p Platform) error {
	clock := time.Now()
	lap := func() time.Duration {
		d := time.Since(clock)
		clock = time.Now()
		return d
	}
	s, err := p.create(ctx)
	if err != nil {
		return fmt.Errorf("create sandbox: %w", err)
	}
	r.create = lap()
	err = firstOutput(ctx, s, "/bin/echo", "hello")
	r.firstExec = lap()
	if err == nil {
		err = firstOutput(ctx, s, "/bin/echo", "hello")
		r.exec = lap()
	}
	if err == nil {
		err = firstOutput(ctx, s, "/bin/bash", "-l", "-c", "echo hello")
		r.login = lap()
	}
	kerr := p.Client.Kill(context.WithoutCancel(ctx), s.ID())
	r.kill = lap()
	return errors.Join(err, kerr)
}
