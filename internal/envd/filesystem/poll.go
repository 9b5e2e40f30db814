package filesystem

import (
	"context"
	"crypto/rand"
	"fmt"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	rpc "github.com/wrenn/wrenn/api/proto/filesystem"
)

const (
	// pollIdle is after how long without a poll a watcher is taken for abandoned.
	pollIdle = time.Hour
	// maxPollers bounds the watchers that are polled.
	maxPollers = 1024
	// maxBuffered and maxBufferedAll bound what waits to be fetched, in bytes, of
	// one watcher and of all.
	maxBuffered    = 8 << 20
	maxBufferedAll = 32 << 20
	// eventOverhead is about what an event takes besides its texts.
	eventOverhead = 160
)

// registry holds the watchers of clients that poll. The zero value is ready.
type registry struct {
	mu       sync.Mutex
	watchers map[string]*poller
	buffered int           // bytes, of all watchers
	idle     time.Duration // pollIdle unless set
}

// poller is a watch whose events wait to be fetched.
type poller struct {
	cancel context.CancelFunc
	ended  chan struct{}
	expiry *time.Timer

	// guarded by the registry's mutex
	events []*rpc.FilesystemEvent
	size   int
	err    error // why there will be no more
}

// CreateWatcher starts a watch for a client that polls.
func (s *Service) CreateWatcher(ctx context.Context, req *rpc.CreateWatcherRequest) (*rpc.CreateWatcherResponse, error) {
	w, err := s.open(ctx, req)
	if err != nil {
		return nil, err
	}
	watching, cancel := context.WithCancel(context.Background()) // ended by RemoveWatcher, its expiry or Close
	p := &poller{cancel: cancel, ended: make(chan struct{})}
	id := "w" + rand.Text()
	if err := s.watchers.register(id, p); err != nil {
		cancel()
		w.Close()
		return nil, err
	}
	go func() {
		defer close(p.ended)
		defer w.Close()
		event := eventsOf(w, req.GetIncludeEntry())
		err := w.run(watching, func(c change) error { return s.watchers.keep(p, event(c)) })
		s.watchers.mu.Lock()
		defer s.watchers.mu.Unlock()
		p.err = err
	}()
	return &rpc.CreateWatcherResponse{WatcherId: id}, nil
}

func (r *registry) register(id string, p *poller) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.watchers) >= maxPollers {
		return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("too many watchers: %d are there and not removed", maxPollers))
	}
	if r.watchers == nil {
		r.watchers = make(map[string]*poller)
	}
	if r.idle == 0 {
		r.idle = pollIdle
	}
	r.watchers[id] = p
	p.expiry = time.AfterFunc(r.idle, func() { r.remove(id) })
	return nil
}

// keep holds an event until it is fetched.
func (r *registry) keep(p *poller, e *rpc.FilesystemEvent) error {
	size := eventOverhead + len(e.GetName())
	if e.GetEntry() != nil {
		size += eventOverhead + 2*proto.Size(e.GetEntry())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if p.size+size > maxBuffered || r.buffered+size > maxBufferedAll {
		return errOverflow
	}
	p.events = append(p.events, e)
	p.size += size
	r.buffered += size
	return nil
}

// take empties a watcher; r.mu is held.
func (r *registry) take(p *poller) []*rpc.FilesystemEvent {
	events := p.events
	r.buffered -= p.size
	p.events, p.size = nil, 0
	return events
}

// GetWatcherEvents returns what has happened since the last call. When the watch
// has ended it says why, once everything before that is fetched.
func (s *Service) GetWatcherEvents(_ context.Context, req *rpc.GetWatcherEventsRequest) (*rpc.GetWatcherEventsResponse, error) {
	r := &s.watchers
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.watchers[req.GetWatcherId()]
	if p == nil {
		return nil, watcherNotFound(req.GetWatcherId())
	}
	p.expiry.Reset(r.idle)
	events := r.take(p)
	if len(events) == 0 && p.err != nil {
		return nil, watchError(p.err)
	}
	return &rpc.GetWatcherEventsResponse{Events: events}, nil
}

// RemoveWatcher ends a watch.
func (s *Service) RemoveWatcher(_ context.Context, req *rpc.RemoveWatcherRequest) (*rpc.RemoveWatcherResponse, error) {
	if !s.watchers.remove(req.GetWatcherId()) {
		return nil, watcherNotFound(req.GetWatcherId())
	}
	return &rpc.RemoveWatcherResponse{}, nil
}

// remove ends a watcher and waits for its end. It reports whether there was one.
func (r *registry) remove(id string) bool {
	r.mu.Lock()
	p := r.watchers[id]
	delete(r.watchers, id)
	r.mu.Unlock()
	if p == nil {
		return false
	}
	p.expiry.Stop()
	p.cancel()
	<-p.ended
	r.mu.Lock()
	defer r.mu.Unlock()
	r.take(p)
	return true
}

func (r *registry) closeAll() {
	r.mu.Lock()
	ids := make([]string, 0, len(r.watchers))
	for id := range r.watchers {
		ids = append(ids, id)
	}
	r.mu.Unlock()
	for _, id := range ids {
		r.remove(id)
	}
}

func watcherNotFound(id string) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("watcher with id %s not found", text(id)))
}
