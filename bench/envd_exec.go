package bench

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// trueProgram is the program that does nothing.
const trueProgram = "/bin/true"

// timed returns how long f takes.
func timed(f func() error) (time.Duration, error) {
	begin := time.Now()
	err := f()
	return time.Since(begin), err
}

// roundTrip is a request to the floor's server and its answer, which is empty.
func (b *envdBench) roundTrip(ctx context.Context) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, b.floor.url+"/health", nil)
	if err != nil {
		return err
	}
	return finish(do(b.floor.http, r, http.StatusNoContent))
}

// warm is an error when connections were made since before: what is measured is
// to go over ones that are there.
func (b *envdBench) warm(before int32) error {
	if n := b.agent.wire.dials.Load() + b.floor.dial.Load() - before; n != 0 {
		return fmt.Errorf("%d samples went over connections that had to be made first", n)
	}
	return nil
}

func (b *envdBench) dials() int32 { return b.agent.wire.dials.Load() + b.floor.dial.Load() }

// measureExec runs /bin/true through the agent, and by itself. Its floor is one
// fork, exec and wait, and one round trip.
func (b *envdBench) measureExec(ctx context.Context) error {
	var run, floor, bare, trip samples
	var dials int32
	for i := range envdWarmUp + b.Samples {
		forked, err := timed(func() error { return exec.Command(trueProgram).Run() })
		if err != nil {
			return err
		}
		tripped, err := timed(func() error { return b.roundTrip(ctx) })
		if err != nil {
			return err
		}
		took, err := b.exec(ctx)
		if err != nil {
			return err
		}
		if i < envdWarmUp {
			dials = b.dials()
			continue
		}
		bare.addMillis(forked)
		trip.addMillis(tripped)
		floor.addMillis(forked + tripped)
		run.addMillis(took)
	}
	if err := b.warm(dials); err != nil {
		return err
	}
	status, err := b.agent.status()
	if err != nil {
		return err
	}
	b.report(
		run.result("exec of /bin/true", "ms").against(floor, 1.3).
			noted("Start with JSON, to the end event; floor: exec.Command(/bin/true).Run and one loopback HTTP round trip"),
		bare.result("floor: fork, exec, wait", "ms"),
		trip.result("floor: HTTP round trip", "ms").noted("GET without body to a plain Go server in another process"),
		single("RSS after exec", "MiB", mib(status.rss)).noted("%d processes", envdWarmUp+b.Samples),
	)
	return nil
}

// exec runs /bin/true in the agent; took is until the end event is here.
func (b *envdBench) exec(ctx context.Context) (took time.Duration, err error) {
	begin := time.Now()
	s, err := b.agent.wire.start(ctx, command(b.dir, trueProgram))
	if err != nil {
		return 0, err
	}
	defer s.close()
	for {
		ev, err := s.next()
		if err != nil {
			return 0, err
		}
		if ev.End != nil {
			took = time.Since(begin)
			return took, s.end(ev)
		}
	}
}

// measureEcho types into a terminal whose line discipline echoes, as a shell's
// does. The goal is two echoes of a bare terminal and one round trip.
func (b *envdBench) measureEcho(ctx context.Context) error {
	master, err := openEcho()
	if err != nil {
		return fmt.Errorf("open terminal: %w", err)
	}
	defer master.close()
	t, err := b.agent.wire.openTerminal(ctx, command(b.dir, "/bin/cat"))
	if err != nil {
		return err
	}
	defer t.close()
	var echo, floor, bare, trip samples
	var dials int32
	for i := range envdWarmUp + b.Samples {
		key := byte('a' + i%26)
		raw, err := timed(func() error { return master.echo(key) })
		if err != nil {
			return fmt.Errorf("bare terminal: %w", err)
		}
		tripped, err := timed(func() error { return b.roundTrip(ctx) })
		if err != nil {
			return err
		}
		took, err := t.echo(ctx, key)
		if err != nil {
			return fmt.Errorf("keystroke %d: %w", i, err)
		}
		if i < envdWarmUp {
			dials = b.dials()
			continue
		}
		bare.addMillis(raw)
		trip.addMillis(tripped)
		floor.addMillis(2*raw + tripped)
		echo.addMillis(took)
	}
	if err := b.warm(dials); err != nil {
		return err
	}
	b.report(
		echo.result("terminal echo", "ms").against(floor, 1).
			noted("SendInput until the byte is back on the stream; floor: twice a bare pty's echo and one loopback HTTP round trip"),
		bare.result("floor: bare pty echo", "ms").noted("write to the master, read it back"),
		trip.result("floor: HTTP round trip beside echo", "ms"),
	)
	return nil
}

// echoTerminal is a terminal in the agent, and the reader of its stream.
type echoTerminal struct {
	wire  *wire
	pid   uint32
	seen  chan keystroke
	err   error // set when seen is closed
	leave context.CancelFunc
}

// keystroke is a byte that came back.
type keystroke struct {
	key byte
	at  time.Time
}

// openTerminal runs a command in a terminal.
func (w *wire) openTerminal(ctx context.Context, request startRequest) (*echoTerminal, error) {
	request.Pty = new(ptyOfClient)
	request.Pty.Size.Cols, request.Pty.Size.Rows = 80, 24
	streamCtx, leave := context.WithCancel(ctx)
	s, err := w.start(streamCtx, request)
	if err != nil {
		leave()
		return nil, err
	}
	t := &echoTerminal{wire: w, pid: s.pid, seen: make(chan keystroke, 64), leave: leave}
	go func() {
		defer close(t.seen)
		defer s.close()
		for {
			ev, err := s.next()
			now := time.Now()
			if err == nil && ev.End != nil {
				err = fmt.Errorf("terminal ended with %q", ev.End.Status)
			}
			if err != nil {
				t.err = err
				return
			}
			if ev.Data == nil {
				continue
			}
			for _, key := range ev.Data.Pty {
				select {
				case t.seen <- keystroke{key, now}:
				case <-streamCtx.Done():
					t.err = streamCtx.Err()
					return
				}
			}
		}
	}()
	return t, nil
}

// echo types a key and returns how long it took to come back.
func (t *echoTerminal) echo(ctx context.Context, key byte) (time.Duration, error) {
	begin := time.Now()
	if err := t.wire.sendInput(ctx, t.pid, []byte{key}); err != nil {
		return 0, err
	}
	select {
	case got, ok := <-t.seen:
		if !ok {
			return 0, t.err
		}
		if got.key != key {
			return 0, fmt.Errorf("typed %q, saw %q", key, got.key)
		}
		return got.at.Sub(begin), nil
	case <-time.After(10 * time.Second):
		return 0, errors.New("does not come back")
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func (t *echoTerminal) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_ = t.wire.kill(ctx, t.pid) // the agent's end hangs the terminal up in any case
	t.leave()
	for range t.seen { // until the reader has ended
	}
}

// bareTerminal is a pseudo-terminal of our own. Its descriptors block: reading
// it takes one system call and no scheduler.
type bareTerminal struct{ master, slave int }

func openEcho() (bareTerminal, error) {
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return bareTerminal{}, err
	}
	t := bareTerminal{master: master, slave: -1}
	var number int
	if err = unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err == nil {
		number, err = unix.IoctlGetInt(master, unix.TIOCGPTN)
	}
	if err == nil {
		t.slave, err = unix.Open("/dev/pts/"+strconv.Itoa(number), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		t.close()
	}
	return t, err
}

func (t bareTerminal) echo(key byte) error {
	if _, err := unix.Write(t.master, []byte{key}); err != nil {
		return os.NewSyscallError("write", err)
	}
	var back [1]byte
	if _, err := unix.Read(t.master, back[:]); err != nil {
		return os.NewSyscallError("read", err)
	}
	if back[0] != key {
		return fmt.Errorf("typed %q, saw %q", key, back[0])
	}
	return nil
}

func (t bareTerminal) close() {
	if t.slave >= 0 {
		unix.Close(t.slave)
	}
	unix.Close(t.master)
}
