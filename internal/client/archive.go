package client

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// Upload copies the contents of a local directory into a directory of the
// sandbox, which is made when it is not there. Modes and links are kept; the
// files belong to the given user (empty: the default one).
func (s *Sandbox) Upload(ctx context.Context, local, remote, user string) error {
	dir, err := s.MakeDir(ctx, remote, user)
	if err != nil {
		return err
	}
	p, err := s.Start(ctx, Command{Path: "tar", Args: []string{"-xopf", "-", "-C", dir.GetPath()}, User: user, Stdin: true})
	if err != nil {
		return fmt.Errorf("start tar in the sandbox: %w", err)
	}
	defer p.Close()
	input := p.Input()
	packed := make(chan error, 1)
	go func() {
		err := pack(input, local)
		sent := input.err == nil
		_ = input.Close() // fails when tar has seen the end of the archive and gone
		if err != nil && sent {
			err = &localError{err}
		}
		packed <- err
	}()
	var complaints bytes.Buffer
	exit, err := p.Wait(io.Discard, &complaints)
	packErr := <-packed // Wait has closed the process, so the input cannot hang
	switch {
	case err != nil:
		return err
	case errors.As(packErr, new(*localError)): // then tar's complaint is a consequence
		return packErr
	case exit.Status() != 0:
		return tarError(exit, complaints.String())
	}
	return packErr
}

// localError is a failure on this side of a transfer.
type localError struct{ err error }

func (e *localError) Error() string { return e.err.Error() }
func (e *localError) Unwrap() error { return e.err }

// Download copies the contents of a directory of the sandbox into a local one,
// which is made when it is not there. Nothing is written outside it, whatever the
// sandbox sends. skip is told about what cannot be copied (devices, sockets).
func (s *Sandbox) Download(ctx context.Context, remote, local, user string, skip func(name string)) error {
	if err := os.MkdirAll(local, 0o755); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	root, err := os.OpenRoot(local)
	if err != nil {
		return fmt.Errorf("open directory: %w", err)
	}
	defer root.Close()
	read, write := io.Pipe()
	unpacked := make(chan error, 1)
	go func() {
		err := unpack(read, root, skip)
		if err == nil {
			_, err = io.Copy(io.Discard, read) // padding behind the end of the archive
		}
		read.CloseWithError(err)
		unpacked <- err
	}()
	err = s.Archive(ctx, remote, write, user)
	write.CloseWithError(err) // nil: the end of the stream
	if unpackErr := <-unpacked; unpackErr != nil && (err == nil || errors.As(err, new(*OutputError))) {
		return unpackErr
	}
	return err
}

// Archive writes the contents of a directory of the sandbox to w as a tar
// archive. remote is an absolute path.
func (s *Sandbox) Archive(ctx context.Context, remote string, w io.Writer, user string) error {
	p, err := s.Start(ctx, Command{Path: "tar", Args: []string{"-cf", "-", "-C", remote, "."}, User: user})
	if err != nil {
		return fmt.Errorf("start tar in the sandbox: %w", err)
	}
	var complaints bytes.Buffer
	exit, err := p.Wait(w, &complaints)
	if err != nil {
		return err
	}
	if exit.Status() != 0 {
		return tarError(exit, complaints.String())
	}
	return nil
}

func tarError(exit Exit, complaints string) error {
	first, _, _ := strings.Cut(strings.TrimSpace(complaints), "\n")
	return fmt.Errorf("tar in the sandbox ended with status %d: %.500q", exit.Status(), first)
}

// pack writes the contents of a directory as a tar archive.
func pack(w io.Writer, dir string) error {
	archive := tar.NewWriter(w)
	err := filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(dir, name)
		if err != nil || relative == "." {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		return packEntry(archive, name, filepath.ToSlash(relative), info)
	})
	if err == nil {
		err = archive.Close()
	}
	if err != nil {
		return fmt.Errorf("pack %s: %w", dir, err)
	}
	return nil
}

func packEntry(archive *tar.Writer, name, relative string, info fs.FileInfo) error {
	target := ""
	switch {
	case info.Mode().IsRegular(), info.IsDir():
	case info.Mode()&fs.ModeSymlink != 0:
		var err error
		if target, err = os.Readlink(name); err != nil {
			return err
		}
	default:
		return nil // devices, sockets and pipes mean nothing elsewhere
	}
	header, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	header.Name = relative
	if info.IsDir() {
		header.Name += "/"
	}
	if err := archive.WriteHeader(header); err != nil || !info.Mode().IsRegular() {
		return err
	}
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = io.Copy(archive, file)
	return err
}

// unpack writes the entries of an archive that nobody trusts below root. The root
// refuses names and links that lead out of it.
func unpack(r io.Reader, root *os.Root, skip func(name string)) error {
	archive := tar.NewReader(r)
	var dirs []*tar.Header // their modes come last: a directory may forbid writing
	for {
		header, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		header.Name = path.Clean(header.Name)
		if header.Typeflag == tar.TypeDir {
			dirs = append(dirs, header)
		}
		if err := unpackEntry(archive, header, root, skip); err != nil {
			return fmt.Errorf("unpack %q: %w", header.Name, err)
		}
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := root.Chmod(dirs[i].Name, mode(dirs[i])); err != nil {
			return fmt.Errorf("unpack %q: %w", dirs[i].Name, err)
		}
	}
	return nil
}

func unpackEntry(r io.Reader, header *tar.Header, root *os.Root, skip func(name string)) error {
	name := header.Name
	if _, sparse := header.PAXRecords["GNU.sparse.major"]; sparse {
		// Not what the tar started here writes. A few bytes of it unpack to as many
		// zeros as they like.
		return errors.New("sparse files are not taken")
	}
	if header.Typeflag == tar.TypeDir {
		return root.MkdirAll(name, 0o755)
	}
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	switch header.Typeflag {
	case tar.TypeReg:
		return unpackFile(r, header, root)
	case tar.TypeSymlink, tar.TypeLink:
		if err := removeFile(root, name); err != nil {
			return err
		}
		if header.Typeflag == tar.TypeLink {
			return root.Link(path.Clean(header.Linkname), name)
		}
		return root.Symlink(header.Linkname, name)
	}
	skip(name)
	return nil
}

func unpackFile(r io.Reader, header *tar.Header, root *os.Root) error {
	// Made anew, so that nothing is written through a link that is in the way.
	if err := removeFile(root, header.Name); err != nil {
		return err
	}
	file, err := root.OpenFile(header.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, r)
	if err == nil {
		err = file.Chmod(mode(header))
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	return err
}

func removeFile(root *os.Root, name string) error {
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// mode returns the permissions of an entry: not its set-user-id and the like.
func mode(header *tar.Header) fs.FileMode { return fs.FileMode(header.Mode) & 0o777 }
