package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/filesystem"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// ReadFile opens a file of the sandbox as the given user (empty: the default
// one). The caller closes it. The error matches sandbox.ErrNotFound when there is
// no such file.
func (s *Sandbox) ReadFile(ctx context.Context, path, user string) (io.ReadCloser, error) {
	op := "read " + path
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.fileURL(path, user), nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	s.address(req.Header, "")
	resp, err := s.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, readError(op, resp)
	}
	return resp.Body, nil
}

// WriteFile writes all of r to a file of the sandbox, which then belongs to the
// given user (empty: the default one). Missing directories are made. size is how
// many bytes r holds, or -1 when that is not known.
func (s *Sandbox) WriteFile(ctx context.Context, path, user string, r io.Reader, size int64) error {
	op := "write " + path
	// Hidden behind a plain reader, so that the transport does not close it.
	body := io.NopCloser(r)
	if size == 0 {
		body = http.NoBody
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.fileURL(path, user), body)
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	req.ContentLength = size
	req.Header.Set("Content-Type", "application/octet-stream")
	s.address(req.Header, "")
	resp, err := s.http.Do(req)
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return readError(op, resp)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	return nil
}

func (s *Sandbox) fileURL(path, user string) string {
	values := url.Values{"path": {path}}
	if user != "" {
		values.Set("username", user)
	}
	return s.baseURL + "/files?" + values.Encode()
}

// Stat describes a path of the sandbox as the given user sees it. The error
// matches sandbox.ErrNotFound when nothing is there.
func (s *Sandbox) Stat(ctx context.Context, path, user string) (*filesystem.EntryInfo, error) {
	resp, err := s.filesystem.Stat(s.Context(ctx, user), &filesystem.StatRequest{Path: path})
	if err != nil {
		return nil, pathError("stat", path, err)
	}
	return resp.GetEntry(), nil
}

// MakeDir makes a directory and its parents; one that is there already is fine.
func (s *Sandbox) MakeDir(ctx context.Context, path, user string) (*filesystem.EntryInfo, error) {
	resp, err := s.filesystem.MakeDir(s.Context(ctx, user), &filesystem.MakeDirRequest{Path: path})
	if connect.CodeOf(err) == connect.CodeAlreadyExists {
		return s.Stat(ctx, path, user)
	}
	if err != nil {
		return nil, pathError("make directory", path, err)
	}
	return resp.GetEntry(), nil
}

func pathError(op, path string, err error) error {
	var rpcErr *connect.Error
	var gone *GoneError
	if errors.As(err, &gone) || !errors.As(err, &rpcErr) {
		return fmt.Errorf("%s %s: %w", op, path, err)
	}
	if rpcErr.Code() == connect.CodeNotFound {
		return sandbox.Errorf(sandbox.ErrNotFound, "%s: no such file or directory in the sandbox", path)
	}
	return fmt.Errorf("%s %s: %w", op, path, rpcErr)
}
