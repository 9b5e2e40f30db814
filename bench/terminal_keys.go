package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

const (
	keyPatience  = 5 * time.Second // a key that takes longer counts as this long
	keysToGiveUp = 3               // lost in a row: the terminal stands still
	keysToWarmUp = 10

	// A fast typist's pauses, cut short so that there are many samples, and
	// uneven so that they do not beat with what else is periodic.
	leastPause, mostPause = 5 * time.Millisecond, 20 * time.Millisecond
)

// openTerminal opens a terminal in the sandbox in which a program echoes, as
// shells and editors do: the terminal itself is raw. Like an SDK it takes
// HTTP/1.1, so that its stream has a connection to itself.
func (b *terminalBench) openTerminal(ctx context.Context, w *way) (*echoTerminal, error) {
	wire := newWire("")
	wire.url, wire.user, wire.token = w.url, "root", b.sandbox.EnvdAccessToken
	wire.header = sandboxPort(b.sandbox.SandboxID, 49983)
	ctx, cancel := context.WithCancel(ctx)
	starting := time.AfterFunc(2*keyPatience, cancel)
	defer starting.Stop()
	t, err := wire.openTerminal(ctx, command("/", "/bin/sh", "-c", "stty raw -echo; printf '\\000'; exec cat"))
	if err != nil {
		cancel()
		return nil, err
	}
	leave := t.leave
	t.leave = func() { leave(); cancel(); wire.http.CloseIdleConnections() }
	if err := t.await(ctx, 0); err != nil {
		t.close()
		return nil, err
	}
	for range keysToWarmUp {
		if _, err := t.echo(ctx, 'w'); err != nil {
			t.close()
			return nil, err
		}
	}
	return t, nil
}

// await waits for a byte on the terminal and drops those before it.
func (t *echoTerminal) await(ctx context.Context, key byte) error {
	for {
		select {
		case got, ok := <-t.seen:
			if !ok {
				return t.err
			}
			if got.key == key {
				return nil
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// errLost is a key that did not come back in time.
var errLost = errors.New("does not come back")

// strike types a key and returns how long it took to come back. Keys that were
// given up before and come now are passed over.
func (t *echoTerminal) strike(ctx context.Context, key byte, patience time.Duration) (time.Duration, error) {
	waiting, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	begin := time.Now()
	if err := t.wire.sendInput(waiting, t.pid, []byte{key}); err != nil {
		if waiting.Err() != nil && ctx.Err() == nil {
			return 0, errLost
		}
		return 0, err
	}
	for {
		select {
		case got, ok := <-t.seen:
			if !ok {
				return 0, t.err
			}
			if got.key == key {
				return got.at.Sub(begin), nil
			}
		case <-waiting.Done():
			if err := ctx.Err(); err != nil {
				return 0, err
			}
			return 0, errLost
		}
	}
}

// keyboard has no key that is used in warming up, and enough of them that one
// which comes late is not taken for its successor.
var keyboard = bytes.ToUpper([]byte("abcdefghijklmnopqrstuvwxyz"))

// measure types keys, each when the one before is back, with pauses between.
func (m *typed) measure(ctx context.Context, t *echoTerminal, keys int, patience time.Duration) error {
	var cpu cpuMeter
	if _, err := cpu.used(); err != nil {
		return err
	}
	pause := time.NewTimer(0)
	defer pause.Stop()
	for i, inRow := 0, 0; i < keys && inRow < keysToGiveUp; i++ {
		pause.Reset(leastPause + rand.N(mostPause-leastPause))
		select {
		case <-pause.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		took, err := t.strike(ctx, keyboard[i%len(keyboard)], patience)
		if errors.Is(err, errLost) {
			m.lost++
			inRow++
			m.addMillis(patience)
			continue
		}
		if err != nil {
			return fmt.Errorf("keystroke %d: %w", i+1, err)
		}
		inRow = 0
		m.addMillis(took)
	}
	used, err := cpu.used()
	m.cpu = append(m.cpu, 100*used)
	return err
}
