package filesystem

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	rpc "github.com/wrenn/wrenn/api/proto/filesystem"
	"github.com/wrenn/wrenn/internal/envd/keepalive"
	"github.com/wrenn/wrenn/internal/envd/user"
)

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
		event := eventsOf(w, req.GetIncludeEntry())
		ended <- w.run(ctx, func(c change) error {
			select {
			case events <- event(c):
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
	w, err := newWatch(ctx, path, req.GetRecursive())
	if err != nil {
		return nil, watchError(err)
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

// eventsOf returns how w's changes are told to clients.
func eventsOf(w *watch, entry bool) func(change) *rpc.FilesystemEvent {
	names := &user.Names{}
	w.caughtUp = func() { names = &user.Names{} } // accounts may have changed meanwhile
	return func(c change) *rpc.FilesystemEvent { return w.event(c, entry, names) }
}

func (w *watch) event(c change, entry bool, names *user.Names) *rpc.FilesystemEvent {
	name, err := filepath.Rel(w.root, c.path)
	if err != nil {
		name = c.path
	}
	e := &rpc.FilesystemEvent{Name: text(name), Type: c.kind}
	gone := c.kind == rpc.EventType_EVENT_TYPE_REMOVE || c.kind == rpc.EventType_EVENT_TYPE_RENAME
	if entry && !gone {
		e.Entry, _ = describe(c.path, names) // none when it is gone already
	}
	return e
}

func watchError(err error) error {
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, errOverflow):
		return connect.NewError(connect.CodeDataLoss, err)
	case errors.Is(err, errLimit):
		return connect.NewError(connect.CodeResourceExhausted, err)
	}
	return rpcError("watch directory", err)
}
