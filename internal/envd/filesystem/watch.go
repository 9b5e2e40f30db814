package filesystem

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	rpc "github.com/wrenn/wrenn/api/proto/filesystem"
	"github.com/wrenn/wrenn/internal/envd/keepalive"
	"github.com/wrenn/wrenn/internal/envd/user"
)

// maxBuffered bounds the events kept for a client that polls.
const maxBuffered = 65536

// WatchDir streams what changes in a directory.
func (s *Service) WatchDir(ctx context.Context, req *rpc.WatchDirRequest, stream *connect.ServerStream[rpc.WatchDirResponse]) error {
	w, err := s.open(ctx, req)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	events := make(chan *rpc.FilesystemEvent, 256)
	ended := make(chan error, 1)
	go func() {
		defer w.Close()
		ended <- w.run(ctx, func(c change) error {
			select {
			case events <- w.event(c, req.GetIncludeEntry()):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		close(events)
	}()
	defer func() {
		cancel()
		for range events {
		}
	}()
	err = stream.Send(&rpc.WatchDirResponse{Event: &rpc.WatchDirResponse_Start{Start: &rpc.WatchDirResponse_StartEvent{}}})
	if err != nil {
		return err
	}
	interval := keepalive.Interval(ctx)
	silent := time.NewTimer(interval)
	defer silent.Stop()
	for {
		select {
		case e, ok := <-events:
			if !ok {
				return watchError(<-ended)
			}
			err = stream.Send(&rpc.WatchDirResponse{Event: &rpc.WatchDirResponse_Filesystem{Filesystem: e}})
		case <-silent.C:
			err = stream.Send(&rpc.WatchDirResponse{Event: &rpc.WatchDirResponse_Keepalive{Keepalive: &rpc.WatchDirResponse_KeepAlive{}}})
		}
		if err != nil {
			return err
		}
		silent.Reset(interval)
	}
}

// watchRequest is what both kinds of watching ask for.
type watchRequest interface {
	GetPath() string
	GetRecursive() bool
	GetAllowNetworkMounts() bool
}

func (s *Service) open(ctx context.Context, req watchRequest) (*watch, error) {
	path, _, err := s.resolve(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	if err := checkDir(path); err != nil {
		return nil, err
	}
	if !req.GetAllowNetworkMounts() && onNetwork(path) {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("cannot watch path on network filesystem: %s", path))
	}
	w, err := newWatch(path, req.GetRecursive())
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENOSPC) {
		return nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("too many watches: %w", err))
	} else if err != nil {
		return nil, rpcError("watch directory", err)
	}
	return w, nil
}

// onNetwork reports whether changes of path can happen elsewhere, unseen here.
func onNetwork(path string) bool {
	var stat unix.Statfs_t
	if err := unix.Statfs(path, &stat); err != nil {
		return false
	}
	switch uint32(stat.Type) {
	case unix.NFS_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC:
		return true
	}
	return false
}

func (w *watch) event(c change, entry bool) *rpc.FilesystemEvent {
	name, err := filepath.Rel(w.root, c.path)
	if err != nil {
		name = c.path
	}
	e := &rpc.FilesystemEvent{Name: text(name), Type: c.kind}
	gone := c.kind == rpc.EventType_EVENT_TYPE_REMOVE || c.kind == rpc.EventType_EVENT_TYPE_RENAME
	if entry && !gone {
		e.Entry, _ = describe(c.path, &user.Names{}) // none when it is gone already
	}
	return e
}

func watchError(err error) error {
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, errOverflow):
		return connect.NewError(connect.CodeDataLoss, err)
	}
	return rpcError("watch directory", err)
}

// registry holds the watchers of clients that poll.
type registry struct {
	mu       sync.Mutex
	watchers map[string]*poller
}

// poller is a watch whose events wait to be fetched.
type poller struct {
	cancel context.CancelFunc
	ended  chan struct{}

	mu     sync.Mutex
	events []*rpc.FilesystemEvent
	err    error // why there will be no more
}

// CreateWatcher starts a watch for a client that polls.
func (s *Service) CreateWatcher(ctx context.Context, req *rpc.CreateWatcherRequest) (*rpc.CreateWatcherResponse, error) {
	w, err := s.open(ctx, req)
	if err != nil {
		return nil, err
	}
	watching, cancel := context.WithCancel(context.Background()) // ended by RemoveWatcher or Close
	p := &poller{cancel: cancel, ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		defer w.Close()
		err := w.run(watching, func(c change) error { return p.add(w.event(c, req.GetIncludeEntry())) })
		p.mu.Lock()
		defer p.mu.Unlock()
		p.err = err
	}()
	id := "w" + rand.Text()
	s.watchers.mu.Lock()
	defer s.watchers.mu.Unlock()
	if s.watchers.watchers == nil {
		s.watchers.watchers = make(map[string]*poller)
	}
	s.watchers.watchers[id] = p
	return &rpc.CreateWatcherResponse{WatcherId: id}, nil
}

func (p *poller) add(e *rpc.FilesystemEvent) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.events) >= maxBuffered {
		return errOverflow
	}
	p.events = append(p.events, e)
	return nil
}

// GetWatcherEvents returns what has happened since the last call. When the watch
// has ended it says why, once everything before that is fetched.
func (s *Service) GetWatcherEvents(_ context.Context, req *rpc.GetWatcherEventsRequest) (*rpc.GetWatcherEventsResponse, error) {
	s.watchers.mu.Lock()
	p := s.watchers.watchers[req.GetWatcherId()]
	s.watchers.mu.Unlock()
	if p == nil {
		return nil, watcherNotFound(req.GetWatcherId())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	events := p.events
	p.events = nil
	if len(events) == 0 && p.err != nil {
		return nil, watchError(p.err)
	}
	return &rpc.GetWatcherEventsResponse{Events: events}, nil
}

// RemoveWatcher ends a watch.
func (s *Service) RemoveWatcher(_ context.Context, req *rpc.RemoveWatcherRequest) (*rpc.RemoveWatcherResponse, error) {
	s.watchers.mu.Lock()
	p := s.watchers.watchers[req.GetWatcherId()]
	delete(s.watchers.watchers, req.GetWatcherId())
	s.watchers.mu.Unlock()
	if p == nil {
		return nil, watcherNotFound(req.GetWatcherId())
	}
	p.stop()
	return &rpc.RemoveWatcherResponse{}, nil
}

func (p *poller) stop() {
	p.cancel()
	<-p.ended
}

func (r *registry) closeAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, p := range r.watchers {
		p.stop()
		delete(r.watchers, id)
	}
}

func watcherNotFound(id string) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("watcher with id %s not found", text(id)))
}
