// Package filesystem serves the sandbox's directories: listing, changing and
// watching them. File contents go another way.
package filesystem

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"connectrpc.com/connect"

	rpc "github.com/wrenn/wrenn/api/proto/filesystem"
	"github.com/wrenn/wrenn/internal/envd/atomicfile"
	"github.com/wrenn/wrenn/internal/envd/settings"
	"github.com/wrenn/wrenn/internal/envd/user"
)

// Service implements the RPC service filesystem.Filesystem.
type Service struct {
	settings *settings.Settings
	log      *slog.Logger
	watchers registry
}

// NewService returns the service. Close ends its watchers.
func NewService(s *settings.Settings, log *slog.Logger) *Service {
	return &Service{settings: s, log: log}
}

// Close ends the watchers that clients left behind.
func (s *Service) Close() { s.watchers.closeAll() }

// Stat describes a file without following links.
func (s *Service) Stat(ctx context.Context, req *rpc.StatRequest) (*rpc.StatResponse, error) {
	path, _, err := s.resolve(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	entry, err := describe(path, &user.Names{})
	if err != nil {
		return nil, rpcError("get file info", err)
	}
	return &rpc.StatResponse{Entry: entry}, nil
}

// MakeDir makes a directory and its parents.
func (s *Service) MakeDir(ctx context.Context, req *rpc.MakeDirRequest) (*rpc.MakeDirResponse, error) {
	path, u, err := s.resolve(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	if info, err := os.Stat(path); err == nil {
		if info.IsDir() {
			return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("directory already exists: %s", text(path)))
		}
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path already exists but it is not a directory: %s", text(path)))
	}
	if _, err := atomicfile.MakeDirs(path, int(u.UID), int(u.GID)); err != nil {
		return nil, rpcError("make directory", err)
	}
	entry, err := describe(path, &user.Names{})
	if err != nil {
		return nil, rpcError("get file info", err)
	}
	return &rpc.MakeDirResponse{Entry: entry}, nil
}

// Move renames a file or directory, making the parents of its new place, which
// may be on another file system.
func (s *Service) Move(ctx context.Context, req *rpc.MoveRequest) (*rpc.MoveResponse, error) {
	source, u, err := s.resolve(ctx, req.GetSource())
	if err != nil {
		return nil, err
	}
	destination, _, err := s.resolve(ctx, req.GetDestination())
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(source); err != nil {
		return nil, rpcError("move", err)
	}
	removeDirs, err := atomicfile.MakeDirs(filepath.Dir(destination), int(u.UID), int(u.GID))
	if err != nil {
		return nil, rpcError("make parent directory", err)
	}
	if err := move(ctx, source, destination); err != nil {
		removeDirs()
		return nil, rpcError("move", err)
	}
	entry, err := describe(destination, &user.Names{})
	if err != nil {
		return nil, rpcError("get file info", err)
	}
	return &rpc.MoveResponse{Entry: entry}, nil
}

// Remove removes a file, or a directory with what is in it. What is not there
// counts as removed.
func (s *Service) Remove(ctx context.Context, req *rpc.RemoveRequest) (*rpc.RemoveResponse, error) {
	path, _, err := s.resolve(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	if path == "/" {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the root directory cannot be removed"))
	}
	if point := mountAt(path); point != "" {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("cannot remove %s: %s is a mount point", text(path), text(point)))
	}
	if err := os.RemoveAll(path); err != nil {
		return nil, rpcError("remove", err)
	}
	return &rpc.RemoveResponse{}, nil
}

// ListDir lists a directory down to a depth. Links below it are not followed,
// and paths are those asked for, not what they resolve to.
func (s *Service) ListDir(ctx context.Context, req *rpc.ListDirRequest) (*rpc.ListDirResponse, error) {
	path, _, err := s.resolve(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	if err := checkDir(path); err != nil {
		return nil, err
	}
	l := lister{ctx: ctx}
	if err := l.list(path, max(req.GetDepth(), 1)); err != nil {
		return nil, rpcError("list directory", err)
	}
	return &rpc.ListDirResponse{Entries: l.entries}, nil
}

// maxEntries bounds a listing: with its message it takes about 1 KiB an entry.
const maxEntries = 250_000

var errTooMany = fmt.Errorf("more than %d entries: list fewer levels at once", maxEntries)

type lister struct {
	ctx     context.Context
	names   user.Names
	entries []*rpc.EntryInfo
}

func (l *lister) list(dir string, depth uint32) error {
	if err := l.ctx.Err(); err != nil {
		return err
	}
	children, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, child := range children {
		path := filepath.Join(dir, child.Name())
		entry, err := describe(path, &l.names)
		if ignoreUnreachable(err) != nil {
			return err
		} else if err != nil {
			continue // gone since the directory was read
		}
		if len(l.entries) == maxEntries {
			return errTooMany
		}
		l.entries = append(l.entries, entry)
		if child.IsDir() && depth > 1 {
			// One that cannot be looked into is listed, as what it is.
			if err := ignoreUnreachable(l.list(path, depth-1)); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkDir returns an error for the client unless path is a directory.
func checkDir(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return rpcError("check directory", err)
	}
	if !info.IsDir() {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path is not a directory: %s", text(path)))
	}
	return nil
}

// resolve finds the user that a request acts as and the path it means.
func (s *Service) resolve(ctx context.Context, path string) (string, user.User, error) {
	u, err := user.Lookup(user.NameFrom(ctx, s.settings.User()))
	if unknown := (user.UnknownError{}); errors.As(err, &unknown) {
		return "", u, connect.NewError(connect.CodeUnauthenticated, unknown)
	} else if err != nil {
		return "", u, connect.NewError(connect.CodeInternal, err)
	}
	resolved, err := user.ResolvePath(path, u.Home, s.settings.Workdir())
	if err != nil {
		return "", u, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return resolved, u, nil
}

// rpcError gives an error of the file system its code.
func rpcError(verb string, err error) error {
	code := connect.CodeInternal
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, fs.ErrNotExist):
		code = connect.CodeNotFound
	case errors.Is(err, syscall.ELOOP):
		code = connect.CodeFailedPrecondition
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.ENAMETOOLONG),
		errors.Is(err, syscall.EINVAL), errors.Is(err, fs.ErrExist):
		code = connect.CodeInvalidArgument
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG), errors.Is(err, errTooMany):
		code = connect.CodeResourceExhausted
	case errors.Is(err, syscall.EXDEV), errors.Is(err, syscall.EBUSY), errors.Is(err, fs.ErrPermission):
		code = connect.CodeFailedPrecondition
	}
	return connect.NewError(code, errors.New(strings.ToValidUTF8(fmt.Sprintf("%s: %v", verb, err), "\uFFFD")))
}
