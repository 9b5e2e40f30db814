package e2b_test

import (
	"strconv"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

func TestEventsTellALife(t *testing.T) {
	r := newRig(t)
	id := r.create(map[string]any{})["sandboxID"].(string)
	other := r.create(map[string]any{})["sandboxID"].(string)
	r.empty(r.do("DELETE", "/sandboxes/"+id, nil))
	path := "/sandboxes/" + id + "/events"
	events := r.list(r.do("GET", path, nil), 200)
	var states []string
	for i, e := range events {
		same(t, "fields", keys(e), []string{"cause", "durationMs", "from", "sandboxID", "seq", "state", "time"})
		same(t, "sandbox", e["sandboxID"], any(id))
		from := any("")
		if i > 0 {
			from = events[i-1]["state"]
		}
		same(t, "from", e["from"], from)
		states = append(states, e["state"].(string))
	}
	same(t, "states", states, []string{"starting", "running", "stopping", "stopped"})
	same(t, "cause", events[3]["cause"], any("it was killed"))

	numbers := func(query string) (list []float64) {
		t.Helper()
		for _, e := range r.list(r.do("GET", path+query, nil), 200) {
			list = append(list, e["seq"].(float64))
		}
		return list
	}
	all := numbers("")
	seq := func(i int) string { return strconv.FormatFloat(all[i], 'f', -1, 64) }
	same(t, "newest", numbers("?order=desc&limit=2"), []float64{all[3], all[2]})
	same(t, "after", numbers("?after="+seq(1)), all[2:])
	same(t, "before", numbers("?order=desc&before="+seq(2)), []float64{all[1], all[0]})
	same(t, "after the last", numbers("?after="+seq(3)), nil)
	same(t, "of another", len(r.list(r.do("GET", "/sandboxes/"+other+"/events", nil), 200)), 2)

	both := r.list(r.do("GET", "/events?limit=5", nil), 200)
	same(t, "of the team", []any{len(both), both[0]["sandboxID"], both[4]["sandboxID"]}, []any{5, any(id), any(id)})
	same(t, "newest of the team", r.list(r.do("GET", "/events?order=desc&limit=1", nil), 200)[0], events[3])
	same(t, "of the others", len(r.list(r.do("GET", "/events", nil, "X-API-Key", foreignKey), 200)), 0)
	r.fails(r.do("GET", "/events?limit=0", nil), 400, "limit")

	// Events outlive the record.
	if _, err := r.store.Sandboxes().Get(t.Context(), idOf(id)); err != nil {
		t.Fatal(err)
	}
	gone := r.put(sandbox.Stopped, func(b *sandbox.Sandbox) { b.Ended = b.Changed })
	if n, err := r.store.Sandboxes().Purge(t.Context(), time.Now().Add(time.Hour)); err != nil || n != 2 {
		t.Fatalf("purged %d records, %v", n, err)
	}
	same(t, "of a purged one", len(r.list(r.do("GET", "/sandboxes/"+gone+"/events", nil), 200)), 1)
	same(t, "of a purged one", numbers(""), all)
	r.fails(r.do("GET", path, nil, "X-API-Key", foreignKey), 404)
}
