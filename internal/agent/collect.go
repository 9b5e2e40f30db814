package agent

import (
	"context"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/internal/guest"
	"github.com/wrenn/wrenn/internal/sandbox"
)

const (
	sampleInterval = 5 * time.Second
	sampleLimit    = 2 * time.Second // one guest's answer
	collectors     = 16              // guests asked at once: some may never answer
	samplesKept    = 720             // an hour
	logBytesKept   = 1 << 20         // a sandbox
)

// sample is one measurement of a sandbox.
type sample struct {
	time time.Time
	guest.Metrics
}

// series holds the latest samples of a sandbox, oldest first.
type series []sample

func (s *series) add(v sample) {
	if len(*s) == samplesKept {
		copy(*s, (*s)[1:])
		(*s)[samplesKept-1] = v
		return
	}
	*s = append(*s, v)
}

// logBuffer holds the latest log entries of a sandbox, oldest first.
type logBuffer struct {
	entries []guest.LogEntry
	bytes   int
	latest  time.Time // of the guest's own entries: where the next pull goes on
}

func (b *logBuffer) add(entries ...guest.LogEntry) {
	for _, e := range entries {
		b.entries = append(b.entries, e)
		b.bytes += entrySize(e)
	}
	for b.bytes > logBytesKept && len(b.entries) > 0 {
		b.bytes -= entrySize(b.entries[0])
		b.entries = b.entries[1:]
	}
}

// entrySize is about what an entry takes in memory: a guest that writes many
// empty ones, or many empty fields, gets no more than others.
func entrySize(e guest.LogEntry) int {
	const entry, field = 160, 64
	n := entry + len(e.Message) + len(e.Level)
	for k, v := range e.Fields {
		n += field + len(k) + len(v)
	}
	return n
}

// collect measures every sandbox and fetches its logs, until the agent ends. A
// guest that does not answer costs its own samples and nobody else's.
func (a *Agent) collect() {
	ticker := time.NewTicker(sampleInterval)
	defer ticker.Stop()
	for {
		select {
		case <-a.ctx.Done():
			return
		case <-ticker.C:
		}
		var g errgroup.Group
		g.SetLimit(collectors)
		for _, m := range a.list() {
			g.Go(func() error {
				a.pullMetrics(m)
				a.pullLogs(m, sampleLimit)
				return nil
			})
		}
		_ = g.Wait() // none returns an error
	}
}

func (a *Agent) pullMetrics(m *managed) {
	_, _, c := m.status()
	if c == nil {
		return
	}
	ctx, cancel := context.WithTimeout(a.ctx, sampleLimit)
	defer cancel()
	got, err := c.Metrics(ctx)
	if err != nil {
		a.log.Debug("measure sandbox", "sandbox", m.id, "err", err)
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.samples.add(sample{time: time.Now(), Metrics: got})
}

func (a *Agent) pullLogs(m *managed, limit time.Duration) {
	_, _, c := m.status()
	if c == nil {
		return
	}
	m.mu.Lock()
	after := m.logs.latest
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(a.ctx, limit)
	defer cancel()
	entries, err := c.Logs(ctx, after)
	if err != nil {
		a.log.Debug("fetch logs of sandbox", "sandbox", m.id, "err", err)
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range entries {
		// Another pull may have been quicker.
		if e.Time.After(m.logs.latest) {
			m.logs.latest = e.Time
			m.logs.add(e)
		}
	}
}

// note adds a log entry of the host's own.
func (m *managed) note(level, message string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.logs.add(guest.LogEntry{Time: time.Now(), Level: level, Message: message})
}

// finalLogs returns all logs of m, closed with how it ended.
func (m *managed) finalLogs(end sandbox.State, reason string) []guest.LogEntry {
	level := "info"
	if end == sandbox.Failed {
		level = "error"
	}
	m.note(level, "sandbox ended: "+reason)
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.logs.entries
}
