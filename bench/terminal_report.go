package bench

import (
	"fmt"
	"slices"
	"strings"
)

// terminalGoals are how much longer than idle the slowest in a hundred keys may
// take, where nothing is shared.
var terminalGoals = map[string]float64{stateStalled: 1.2, stateLoaded: 2}

// results are the figures of one way: the terminal first, then what it was
// loaded with.
func (w *way) results() []Result {
	var results []Result
	for _, state := range w.states {
		results = append(results, w.keystroke(state))
	}
	results = append(results, w.stalled())
	if slices.Contains(w.states, stateLoaded) {
		results = append(append(results, w.cpu()), w.load()...)
	}
	return results
}

// keystroke is the figure of one state. Its ratio compares medians, as in every
// result; what is judged is the p99.
func (w *way) keystroke(state string) Result {
	keys, idle := w.keys[state], w.keys[stateIdle]
	r := keys.resultOrNone(w.name+"keystroke, "+state, "ms")
	var notes []string
	if state == stateIdle {
		notes = append(notes, "SendInput until the byte is back from a program in a raw terminal")
		if w.about != "" {
			notes = append(notes, "everything through a reverse proxy with "+w.about)
		}
	} else if len(keys.samples) > 0 && len(idle.samples) > 0 {
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

// stalled is how many downloads had stopped indeed, while keys were typed.
func (w *way) stalled() Result {
	var blocked samples
	for _, l := range w.loads[stateStalled] {
		blocked = append(blocked, float64(l.Blocked))
	}
	r := blocked.resultOrNone(w.name+"load: stalled downloads", "downloads")
	r.Note = "that could not go on, as the application sees it"
	if w.shared {
		return r
	}
	return r.want(fmt.Sprintf("≥ %d", fullLoad.Stalled), r.P50 >= float64(fullLoad.Stalled))
}

// cpu is how busy the machine was. The goals hold where it was not saturated.
func (w *way) cpu() Result {
	idle, stalled, loaded := w.keys[stateIdle].cpu, w.keys[stateStalled].cpu, w.keys[stateLoaded].cpu
	limit := 100 * fullLoad.Limit
	r := loaded.resultOrNone(w.name+"CPU, "+stateLoaded, "%")
	r = r.want(fmt.Sprintf("≤ %.0f", limit), r.P50 <= limit)
	r.Note = "all of the machine"
	if len(idle) > 0 && len(stalled) > 0 {
		r.Note += fmt.Sprintf("; %s %.0f %%, %s %.0f %%", stateIdle, idle.quantile(.5), stateStalled, stalled.quantile(.5))
		if idle.quantile(.5) > limit {
			r.Note += ": others kept it busy, so this run says little"
		}
	}
	return r
}

// resultOrNone is result, also of what could not be measured at all.
func (s samples) resultOrNone(metric, unit string) Result {
	if len(s) == 0 {
		return Result{Metric: metric, Unit: unit}
	}
	return s.result(metric, unit)
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
		kind = "streams in place of WebSockets, which the relay cannot open over HTTP/2"
	}
	m := messages.resultOrNone(w.name+"load: messages", "1/s")
	m.Note = fmt.Sprintf("that came back, of %d bytes, over %d %s, %d/s each", messageSize, fullLoad.Sockets, kind, messageRate)
	p := polls.resultOrNone(w.name+"load: polls", "1/s")
	p.Note = fmt.Sprintf("GET of %d bytes", len(pollAnswer))
	d := down.resultOrNone(w.name+"load: downloads", "MiB/s")
	d.Note = fmt.Sprintf("%d, at full speed but for the limit on the CPU", fullLoad.Downloads)
	u := up.resultOrNone(w.name+"load: uploads", "MiB/s")
	u.Note = fmt.Sprintf("%d, likewise", fullLoad.Uploads)
	if w.shared {
		if flowing < expected {
			m.Note += fmt.Sprintf("; of all %d connections of the load %d carried nothing", expected, expected-flowing)
		}
		return []Result{m, p, d, u}
	}
	leastMessages, leastPolls := enough*float64(fullLoad.Sockets*messageRate), enough*float64(fullLoad.Polls)
	m = m.want(fmt.Sprintf("≥ %.0f", leastMessages), m.P50 >= leastMessages)
	p = p.want(fmt.Sprintf("≥ %.0f", leastPolls), p.P50 >= leastPolls)
	return []Result{m, p, d, u}
}
