package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/wrenn/wrenn/internal/client"
)

// TerminalOptions say what Terminal measures and how long it takes.
type TerminalOptions struct {
	Keys   int // typed in each state, on each way; a hundred of them at least for a p99
	Rounds int // in which they are typed: all states in turn in each, for machines that are noisy

	// Self is this program's command that calls ServeTerminalApp, RunTerminalLoad
	// or ServeTerminalRelay for the argument "app", "load" or "relay", the last with
	// URL and window behind it. Its first part is a file, which is copied into the
	// sandbox.
	Self []string
}

// The states in which keys are typed.
const (
	stateIdle    = "idle"
	stateStalled = "50 stalled downloads"
	stateLoaded  = "full load"
)

var terminalStates = []string{stateIdle, stateStalled, stateLoaded}

// way is one of the transports that terminal and load take together.
type way struct {
	name   string // before the names of its metrics
	about  string // in the note of its first
	url    string // of its data plane
	shared bool   // may break down, and has no goals
	rounds int
	states []string
	relay  *pipedChild // that everything goes through; nil where there is none

	keys  map[string]*typed
	loads map[string][]loadReport
}

// typed are the keystrokes of one state.
type typed struct {
	samples
	lost   int     // of these: not back in time
	cpu    samples // % of the machine, one for each round
	broken string  // what ended a round early, the last time
}

// terminalBench is one run of Terminal and what it holds.
type terminalBench struct {
	TerminalOptions
	sandbox client.Info
	ways    []*way
	rate    map[*way]float64 // bytes per second that the load came to in the last round
}

// Terminal measures how long a keystroke takes to come back from a terminal in a
// sandbox, through the whole platform: with nothing else to do, beside downloads
// whose readers have stopped, and with an application in the same sandbox at
// full load. Then the same where all of it shares one HTTP/2 connection.
func Terminal(ctx context.Context, p Platform, o TerminalOptions) (_ Report, err error) {
	r := Report{Bench: "terminal", Host: thisHost(runtimeName)}
	b := &terminalBench{TerminalOptions: o, rate: make(map[*way]float64)}
	b.sandbox, err = p.Client.Create(ctx, client.CreateRequest{TemplateID: "base", Timeout: time.Hour})
	if err != nil {
		return r, fmt.Errorf("create sandbox: %w", err)
	}
	defer func() {
		err = errors.Join(err, p.Client.Kill(context.WithoutCancel(ctx), b.sandbox.SandboxID))
	}()
	progress("terminal: copy the application into the sandbox")
	if err := b.startApp(ctx, p.Client.Sandbox(b.sandbox)); err != nil {
		return r, fmt.Errorf("start the application in the sandbox: %w", err)
	}
	b.ways = []*way{{url: p.DataURL, rounds: o.Rounds, states: terminalStates}}
	defer b.stopRelays()
	for _, shared := range []struct {
		name   string
		window int
		rounds int
		states []string
		about  string
	}{
		{"shared HTTP/2: ", 0, o.Rounds, terminalStates, "the library's windows (4 MiB for a stream, 1 GiB for all)"},
		{"shared HTTP/2, 64 KiB: ", protocolWindow, 1, terminalStates[:2], "the windows that the protocol begins with; one round"},
	} {
		relay, url, err := startPiped(ctx, nil, o.Self, "relay", p.DataURL, strconv.Itoa(shared.window))
		if err != nil {
			return r, fmt.Errorf("start relay: %w", err)
		}
		b.ways = append(b.ways, &way{
			name: shared.name, about: shared.about, url: url, shared: true,
			rounds: shared.rounds, states: shared.states, relay: relay,
		})
	}
	for _, w := range b.ways {
		w.keys, w.loads = make(map[string]*typed), make(map[string][]loadReport)
		for _, state := range terminalStates {
			w.keys[state] = new(typed)
		}
	}
	if err := b.measure(ctx); err != nil {
		return r, err
	}
	b.stopRelays()
	for _, w := range b.ways {
		r.Results = append(r.Results, w.results()...)
	}
	return r, nil
}

// stopRelays ends the relays and notes what they say. That one ended before shows
// in what went through it.
func (b *terminalBench) stopRelays() {
	for _, w := range b.ways {
		if w.relay == nil {
			continue
		}
		var last relayReport
		if text, err := w.relay.stop(); err == nil && json.Unmarshal(text, &last) == nil {
			w.about += fmt.Sprintf("; %d connection to the platform", last.Connections)
		}
		w.relay = nil
	}
}

// startApp runs this program in the sandbox and returns when it serves.
func (b *terminalBench) startApp(ctx context.Context, s *client.Sandbox) error {
	program, err := os.Open(b.Self[0])
	if err != nil {
		return err
	}
	defer program.Close()
	info, err := program.Stat()
	if err != nil {
		return err
	}
	const path = "/tmp/wrenn-bench"
	if err := s.WriteFile(ctx, path, "", program, info.Size()); err != nil {
		return err
	}
	if exit, err := s.Run(ctx, client.Command{Path: "chmod", Args: []string{"755", path}}); err != nil || exit.Status() != 0 {
		return fmt.Errorf("chmod: status %d, %w", exit.Status(), err)
	}
	return firstOutput(ctx, s, path, append(b.Self[1:len(b.Self):len(b.Self)], "app")...)
}

func (b *terminalBench) measure(ctx context.Context) error {
	for round := range b.Rounds {
		keys := (b.Keys + b.Rounds - 1) / b.Rounds
		for i := range b.ways {
			w := b.ways[(i+round)%len(b.ways)] // who comes first changes
			if round >= w.rounds {
				continue
			}
			for _, state := range w.states {
				progress("terminal: round %d of %d: %s%s", round+1, b.Rounds, w.name, state)
				err := b.measureState(ctx, w, state, keys)
				switch {
				case ctx.Err() != nil:
					return ctx.Err()
				case err != nil && !w.shared:
					return fmt.Errorf("%s: %w", state, err)
				case err != nil:
					w.keys[state].broken = err.Error()
				}
			}
		}
	}
	return nil
}

// measureState types keys in one state.
func (b *terminalBench) measureState(ctx context.Context, w *way, state string, keys int) error {
	t, err := b.openTerminal(ctx, w)
	if err != nil {
		return fmt.Errorf("open terminal: %w", err)
	}
	defer t.close()
	order := fullLoad
	order.URL, order.Sandbox, order.Upgrade = w.url, b.sandbox.SandboxID, !w.shared
	order.Rate = max(order.Rate, b.rate[w])
	switch state {
	case stateIdle:
		return w.keys[state].measure(ctx, t, keys, keyPatience)
	case stateStalled:
		order = loadOrder{URL: order.URL, Sandbox: order.Sandbox, Stalled: order.Stalled}
	}
	line, err := json.Marshal(order)
	if err != nil {
		return err
	}
	load, _, err := startPiped(ctx, append(line, '\n'), b.Self, "load")
	if err != nil {
		return fmt.Errorf("start load: %w", err)
	}
	err = w.keys[state].measure(ctx, t, keys, keyPatience)
	last, stopped := load.stop()
	if stopped != nil {
		return errors.Join(err, stopped)
	}
	var report loadReport
	if err := json.Unmarshal(last, &report); err != nil {
		return fmt.Errorf("read the load's report: %w", err)
	}
	w.loads[state] = append(w.loads[state], report)
	if state == stateLoaded {
		b.rate[w] = report.Rate
	}
	if report.Errors > 0 {
		err = errors.Join(err, fmt.Errorf("the load is not what it should be: %s", report.Error))
	}
	return err
}
