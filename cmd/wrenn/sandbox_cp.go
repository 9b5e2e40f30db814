package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/api/proto/filesystem"
	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/sandbox"
)

func newSandboxCopyCmd() *cobra.Command {
	var user string
	cmd := &cobra.Command{
		Use:   "cp SRC DST",
		Short: "Copy files into or out of a sandbox",
		Long: `Copy a file or a directory into or out of a sandbox. One of the two sides is
ID:PATH, the other a local path or - for standard input or output. (A local name
with a colon is written ./NAME.)

What is copied to a directory that exists is put into it, under its own name;
a directory copied to - comes as a tar archive. Relative paths in a sandbox begin
at the user's home.`,
		Example: `  wrenn sandbox cp data.csv SANDBOX:
  wrenn sandbox cp SANDBOX:/var/log ./logs
  wrenn sandbox cp SANDBOX:result.json - | jq .`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageErrorf("want SRC and DST, got %d arguments", len(args))
			}
			src, dst := parseLocation(args[0]), parseLocation(args[1])
			if (src.sandbox == "") == (dst.sandbox == "") {
				return usageErrorf("one of SRC and DST must be ID:PATH, the other local")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			src, dst := parseLocation(args[0]), parseLocation(args[1])
			info, err := findAwake(cmd.Context(), c, src.sandbox+dst.sandbox)
			if err != nil {
				return err
			}
			t := transfer{sandbox: c.Sandbox(info), user: user}
			if dst.sandbox != "" {
				return t.upload(cmd.Context(), src.path, dst.path)
			}
			return t.download(cmd.Context(), src.path, dst.path)
		},
	}
	cmd.Flags().StringVarP(&user, "user", "u", "", "user in the sandbox to act as (default: the template's)")
	return cmd
}

// location is one side of a copy: local when sandbox is empty.
type location struct{ sandbox, path string }

func parseLocation(arg string) location {
	id, rest, ok := strings.Cut(arg, ":")
	if !ok || id == "" || strings.Trim(id, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		return location{path: arg}
	}
	if rest == "" {
		rest = "."
	}
	return location{sandbox: id, path: rest}
}

// transfer copies between this machine and a sandbox.
type transfer struct {
	sandbox *client.Sandbox
	user    string // empty: the template's
}

func (t transfer) upload(ctx context.Context, local, remote string) error {
	if local == "-" {
		return t.sandbox.WriteFile(ctx, remote, t.user, os.Stdin, -1)
	}
	info, err := os.Stat(local)
	if err != nil {
		return err
	}
	existing, err := t.sandbox.Stat(ctx, remote, t.user)
	switch {
	case errors.Is(err, sandbox.ErrNotFound):
		if strings.HasSuffix(remote, "/") && !info.IsDir() {
			remote = path.Join(remote, filepath.Base(local))
		}
	case err != nil:
		return err
	case existing.GetType() == filesystem.FileType_FILE_TYPE_DIRECTORY:
		name, err := ownName(local)
		if err != nil {
			return err
		}
		remote = path.Join(existing.GetPath(), name)
	}
	if info.IsDir() {
		return t.sandbox.Upload(ctx, local, remote, t.user)
	}
	return t.uploadFile(ctx, local, remote, info)
}

// ownName is the last element of a local path, also of "." and "..".
func ownName(local string) (string, error) {
	abs, err := filepath.Abs(local)
	return filepath.Base(abs), err
}

func (t transfer) uploadFile(ctx context.Context, local, remote string, info fs.FileInfo) error {
	file, err := os.Open(local)
	if err != nil {
		return err
	}
	defer file.Close()
	size := int64(-1) // a pipe or a device: until its end
	if info.Mode().IsRegular() {
		size = info.Size()
	}
	if err := t.sandbox.WriteFile(ctx, remote, t.user, file, size); err != nil {
		return err
	}
	if info.Mode()&0o111 == 0 {
		return nil
	}
	// Programs stay programs. The file routes know no modes.
	mode := fmt.Sprintf("%o", info.Mode().Perm())
	result, err := t.sandbox.Run(ctx, client.Command{Path: "chmod", Args: []string{mode, "--", remote}, User: t.user, Dir: "~"})
	if err == nil && result.Status() != 0 {
		err = fmt.Errorf("%s", printable(strings.TrimSpace(string(result.Stderr))))
	}
	if err != nil {
		return fmt.Errorf("set mode of %s: %w", remote, err)
	}
	return nil
}

func (t transfer) download(ctx context.Context, remote, local string) error {
	entry, err := t.sandbox.Stat(ctx, remote, t.user)
	if err != nil {
		return err
	}
	isDir := entry.GetType() == filesystem.FileType_FILE_TYPE_DIRECTORY
	if local == "-" {
		if isDir {
			return t.sandbox.Archive(ctx, entry.GetPath(), os.Stdout, t.user)
		}
		return t.readFile(ctx, entry.GetPath(), os.Stdout)
	}
	info, err := os.Stat(local)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil && info.IsDir() {
		name := path.Base(entry.GetPath())
		if name == "/" || name == ".." {
			name = "."
		}
		local = filepath.Join(local, name)
	}
	if isDir {
		return t.sandbox.Download(ctx, entry.GetPath(), local, t.user, func(name string) {
			fmt.Fprintf(os.Stderr, "wrenn: left out %s: neither file, directory nor link\n", printable(name))
		})
	}
	if err == nil && !info.IsDir() && !info.Mode().IsRegular() {
		return t.downloadInto(ctx, entry.GetPath(), local) // a device or a pipe
	}
	return t.downloadFile(ctx, entry, local)
}

// downloadFile writes a file under another name first, so that a transfer that
// breaks off leaves what was there.
func (t transfer) downloadFile(ctx context.Context, entry *filesystem.EntryInfo, local string) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(local), "."+filepath.Base(local)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(tmp.Name())
		}
	}()
	err = t.readFile(ctx, entry.GetPath(), tmp)
	if err == nil {
		err = tmp.Chmod(fs.FileMode(entry.GetMode()) & 0o777)
	}
	if closeErr := tmp.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), local)
	}
	return err
}

func (t transfer) downloadInto(ctx context.Context, remote, local string) error {
	file, err := os.OpenFile(local, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	return t.readFile(ctx, remote, file)
}

func (t transfer) readFile(ctx context.Context, remote string, w io.Writer) error {
	body, err := t.sandbox.ReadFile(ctx, remote, t.user)
	if err != nil {
		return err
	}
	defer body.Close()
	if _, err := io.Copy(w, body); err != nil {
		return fmt.Errorf("read %s: %w", remote, err)
	}
	return nil
}
