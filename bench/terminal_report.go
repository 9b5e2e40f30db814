package bench

import (
	"fmt"
	"strings"
)

// terminalGoals are how much longer than idle the slowest in a hundred keys may
// take, where nothing is shared.
var terminalGoals = map[string]float64{stateStalled: 1.2, stateLoaded: 2}

// results are the figures of one way, in which the terminal comes first and then
// what it was loaded with.
func (w *way) results(relayed relayReport) []Result {
	idle := w.keys[stateIdle]
	var results []Result
	for _, state := range terminalStates {
		results = append(results, w.keystroke(state, idle))
	}
	if w.shared {
		results[0].Note += fmt.Sprintf("; all through a reverse proxy with %d connection to the platform", relayed.Connections)
	}
	busy := w.keys[stateLoaded].cpu.result(w.name+"CPU, "+stateLoaded, "%").
		noted("all of the machine; %s %.0f %%, %s %.0f %%", stateIdle, idle.cpu.quantile(.5), stateStalled, w.keys[stateStalled].cpu.quantile(.5))
	results = append(results, busy.want(fmt.Sprintf("≤ %.0f", 100*fullLoad.Limit), busy.P50 <= 100*fullLoad.Limit))
	return append(results, w.load()...)
}

// keystroke is the figure of one state. Its ratio compares medians, as in every
// result; what is judged is the p99.
func (w *way) keystroke(state string, idle *typed) Result {
	keys := w.keys[state]
	r := keys.result(w.name+"keystroke, "+state, "ms")
	var notes []string
	if state == stateIdle {
		notes = append(notes, "SendInput until the byte is back from a program in a raw terminal")
	} else {
		r = r.beside(idle.samples)
		times := round(r.P99 / round(idle.quantile(.99)))
		notes = append(notes, fmt.Sprintf("p99 is %v × idle p99; floor: idle", times))
		if most := terminalGoals[state]; !w.shared {
			r = r.want(fmt.Sprintf("p99 ≤ %v × idle p99", most), times <= most)
		}
	}
	if keys.lost > 0 {
		notes = append(notes, fmt.Sprintf("%d of %d keys were not back within %s and count as that; %d in a row end a round",
			keys.lost, len(keys.samples), keyPatience, keysToGiveUp))
	}
	if keys.broken != "" {
		notes = append(notes, "broken: "+keys.broken)
	}
	r.Note = strings.Join(notes, "; ")
	return r
}

// load is what went past the terminal under full load.
func (w *way) load() []Result {
	var messages, polls, down, up samples
	var flowing, expected int64
	for _, l := range w.loads[stateLoaded] {
		messages = append(messages, float64(l.Messages)/l.Seconds)
		polls = append(polls, float64(l.Polls)/l.Seconds)
		down = append(down, mib(l.Down)/l.Seconds)
		up = append(up, mib(l.Up)/l.Seconds)
		flowing += l.Flowing
		expected += int64((&load{loadOrder: fullLoad}).connections())
	}
	const enough = .95 // of what is asked for; the rest are moments at begin and end
	kind := "WebSockets"
	if w.shared {
		kind = "streams in place of WebSockets, which a shared connection does not carry"
	}
	wanted := float64(fullLoad.Sockets * messageRate)
	m := messages.result(w.name+"load: messages", "1/s").noted("%d %s of %d/s, %d bytes each, that came back", fullLoad.Sockets, kind, messageRate, messageSize)
	p := polls.result(w.name+"load: polls", "1/s").noted("GET of %d bytes", len(pollAnswer))
	d := down.result(w.name+"load: downloads", "MiB/s").noted("%d, at full speed but for the limit on the CPU", fullLoad.Downloads)
	u := up.result(w.name+"load: uploads", "MiB/s").noted("%d, likewise", fullLoad.Uploads)
	if !w.shared {
		m = m.want(fmt.Sprintf("≥ %.0f", enough*wanted), m.P50 >= enough*wanted)
		p = p.want(fmt.Sprintf("≥ %.0f", enough*float64(fullLoad.Polls)), p.P50 >= enough*float64(fullLoad.Polls))
	} else if flowing < expected {
		m.Note += fmt.Sprintf("; of all %d connections %d carried nothing", expected, expected-flowing)
	}
	return []Result{m, p, d, u}
}
