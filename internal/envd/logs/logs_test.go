package logs

import (
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestTheRingKeepsTheYoungestEntries(t *testing.T) {
	r := NewRing(10_000)
	log := slog.New(r.Handler(slog.LevelInfo)).With("who", "me").WithGroup("g")
	log.Debug("not kept")
	for i := range 1000 {
		log.Info("entry", "i", i, "err", errors.New("bad"), "took", time.Second)
	}
	all := r.After(0)
	size := 0
	var last time.Time
	next := -1
	for _, raw := range all {
		var e Entry
		if err := json.Unmarshal(raw, &e); err != nil {
			t.Fatal(err)
		}
		if !e.Time.After(last) {
			t.Fatalf("%v does not come after %v", e.Time, last)
		}
		i := int(e.Fields["g.i"].(float64))
		if next >= 0 && i != next {
			t.Fatalf("entry %d follows where %d should", i, next)
		}
		if e.Fields["who"] != "me" || e.Fields["g.err"] != "bad" || e.Fields["g.took"] != "1s" || e.Level != "info" {
			t.Fatalf("got %+v", e)
		}
		last, next, size = e.Time, i+1, size+len(raw)
	}
	if next != 1000 || size > 10_000 || size < 5_000 {
		t.Errorf("kept %d entries of %d bytes up to %d", len(all), size, next-1)
	}
	if rest := r.After(last.UnixNano()); len(rest) != 0 {
		t.Errorf("after the last there is %s", rest)
	}
	if rest := r.After(last.UnixNano() - 1); len(rest) != 1 || !strings.Contains(string(rest[0]), `"g.i":999`) {
		t.Errorf("just before the last there is %s", rest)
	}
}
