package clienttest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// lifecycle is what a sandbox is said to do by itself.
func lifecycle(pause, resume bool) *client.Lifecycle {
	l := &client.Lifecycle{OnTimeout: "kill", AutoResume: resume}
	if pause {
		l.OnTimeout = "pause"
	}
	return l
}

func (p *Platform) add(g *guest, cause string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sandboxes[g.info.SandboxID] = g
	p.happened(g.info.SandboxID, "running", cause)
}

// happened writes an event. The caller holds the lock.
func (p *Platform) happened(id, state, cause string) {
	e := client.Event{Seq: int64(len(p.events[id]) + 1), Time: time.Now(), SandboxID: id, State: state, Cause: cause}
	if n := len(p.events[id]); n > 0 {
		last := p.events[id][n-1]
		e.From, e.DurationMS = last.State, e.Time.Sub(last.Time).Milliseconds()
	}
	p.events[id] = append(p.events[id], e)
}

func (p *Platform) runs(id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	g := p.sandboxes[id]
	return g != nil && g.info.State == "running"
}

// move takes a sandbox from one state to another. A paused one is a guest that
// nobody is let through to.
func (p *Platform) move(id, from, to, cause string) (client.Info, int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	g := p.sandboxes[id]
	switch {
	case g == nil:
		return client.Info{}, http.StatusNotFound
	case g.info.State != from:
		return g.info, http.StatusConflict
	}
	if g.info.State = to; to == "paused" {
		g.sleep()
	} else {
		g.wake()
	}
	p.happened(id, to, cause)
	return g.info, 0
}

func (p *Platform) pause(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	info, status := p.move(id, "running", "paused", "paused by request")
	switch status {
	case 0:
		w.WriteHeader(http.StatusNoContent)
	case http.StatusNotFound:
		fail(w, status, p.notFound(id))
	default:
		fail(w, status, fmt.Sprintf("sandbox %q is %s", id, info.State))
	}
}

func (p *Platform) connect(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	info, status := p.move(id, "paused", "running", "resumed by request")
	switch status {
	case 0:
		answer(w, http.StatusCreated, info)
	case http.StatusNotFound:
		fail(w, status, p.notFound(id))
	default:
		answer(w, http.StatusOK, info)
	}
}

// fork makes the copies that were asked for but for the third, which fails.
func (p *Platform) fork(w http.ResponseWriter, r *http.Request) {
	var body struct{ Count int }
	source := p.find(r.PathValue("id"))
	if source == nil {
		fail(w, http.StatusNotFound, p.notFound(r.PathValue("id")))
		return
	}
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		fail(w, http.StatusBadRequest, err.Error())
		return
	}
	results := []map[string]any{}
	for i := range body.Count {
		p.mu.Lock()
		info := source.info
		p.mu.Unlock()
		info.SandboxID, info.EnvdAccessToken = string(sandbox.NewID()), "token-"+string(sandbox.NewID())
		g, err := startGuest(info, nil)
		if err != nil || i == 2 {
			if g != nil {
				g.stop()
			}
			results = append(results, map[string]any{"error": map[string]any{"code": 503, "message": "no capacity"}})
			continue
		}
		p.add(g, "forked from "+source.info.SandboxID)
		results = append(results, map[string]any{"sandbox": info})
	}
	answer(w, http.StatusCreated, results)
}

func (p *Platform) snapshot(w http.ResponseWriter, r *http.Request) {
	var body struct{ Name string }
	g := p.find(r.PathValue("id"))
	if g == nil {
		fail(w, http.StatusNotFound, p.notFound(r.PathValue("id")))
		return
	}
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		fail(w, http.StatusBadRequest, err.Error())
		return
	}
	s := client.Snapshot{
		SnapshotID: string(sandbox.NewID()) + ":default", Names: []string{}, SandboxID: g.info.SandboxID,
		TemplateID: g.info.TemplateID, Alias: g.info.Alias, Kind: "memory", SizeBytes: 12 << 20, CreatedAt: time.Now(),
	}
	if body.Name != "" {
		s.Names = append(s.Names, "default/"+body.Name+":default")
	}
	p.mu.Lock()
	p.snapshots = append([]client.Snapshot{s}, p.snapshots...)
	p.mu.Unlock()
	answer(w, http.StatusCreated, s)
}

func (p *Platform) hasSnapshot(ref string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.snapshots, func(s client.Snapshot) bool { return called(s, ref) })
}

func called(s client.Snapshot, ref string) bool {
	ref = strings.TrimSuffix(ref, ":default") + ":default"
	return s.SnapshotID == ref || slices.Contains(s.Names, "default/"+strings.TrimPrefix(ref, "default/"))
}

func (p *Platform) listSnapshots(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	p.mu.Lock()
	list := []client.Snapshot{}
	for _, s := range p.snapshots {
		if query.Has("sandboxID") && s.SandboxID != query.Get("sandboxID") || query.Has("name") && !called(s, query.Get("name")) {
			continue
		}
		list = append(list, s)
	}
	p.mu.Unlock()
	answer(w, http.StatusOK, page(p, w, query, list))
}

func (p *Platform) deleteSnapshot(w http.ResponseWriter, r *http.Request) {
	ref := r.PathValue("ref")
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.IndexFunc(p.snapshots, func(s client.Snapshot) bool { return called(s, ref) })
	if i < 0 {
		fail(w, http.StatusNotFound, fmt.Sprintf("snapshot %q not found", ref))
		return
	}
	p.snapshots = slices.Delete(p.snapshots, i, i+1)
	w.WriteHeader(http.StatusNoContent)
}

func (p *Platform) listEvents(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	list := slices.Clone(p.events[r.PathValue("id")])
	p.mu.Unlock()
	if len(list) == 0 {
		fail(w, http.StatusNotFound, p.notFound(r.PathValue("id")))
		return
	}
	answer(w, http.StatusOK, list)
}

func (p *Platform) listAllEvents(w http.ResponseWriter, _ *http.Request) {
	p.mu.Lock()
	list := []client.Event{}
	for _, of := range p.events {
		list = append(list, of...)
	}
	p.mu.Unlock()
	slices.SortFunc(list, func(a, b client.Event) int { return a.Time.Compare(b.Time) })
	answer(w, http.StatusOK, list)
}
