package agent

import (
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/guest"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// heap is what is in use, in MiB.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc >> 20)
}

func TestLogsOfEndedSandboxesAreBoundedTogether(t *testing.T) {
	o := newObituaries()
	before := heap()
	for i := range 300 {
		ob := obituary{ID: sandbox.NewID(), State: sandbox.Stopped, Reason: strconv.Itoa(i), Time: time.Now()}
		for range 16 {
			ob.Logs = append(ob.Logs, guest.LogEntry{Message: strings.Clone(strings.Repeat("x", logBytesKept/16-1000))})
		}
		o.add(ob, false)
	}
	if grown := heap() - before; grown > 2*obituaryLogs>>20 {
		t.Errorf("the logs of ended sandboxes take %d MiB", grown)
	}
	list := o.list()
	if n := len(list); n != 300 {
		t.Fatalf("%d of 300 sandboxes are remembered", n)
	}
	if list[0].Logs != nil || list[299].Logs == nil {
		t.Error("the oldest logs give way, not others")
	}
}

func TestALogOfManySmallPartsTakesNoMoreThanOneOfFew(t *testing.T) {
	for name, entry := range map[string]func() guest.LogEntry{
		"empty entries": func() guest.LogEntry { return guest.LogEntry{Fields: map[string]string{}} },
		"empty fields": func() guest.LogEntry {
			e := guest.LogEntry{Fields: map[string]string{}}
			for i := range 1000 {
				e.Fields[strconv.Itoa(i)] = ""
			}
			return e
		},
	} {
		t.Run(name, func(t *testing.T) {
			logs := make([]logBuffer, 8)
			before := heap()
			for i := range logs {
				for logs[i].bytes < logBytesKept-100_000 {
					logs[i].add(entry())
				}
			}
			if grown := heap() - before; grown > 2*int64(len(logs))*logBytesKept>>20 {
				t.Errorf("%d logs take %d MiB", len(logs), grown)
			}
			runtime.KeepAlive(logs)
		})
	}
}
