package user

import (
	"errors"
	"path/filepath"
	"strings"
)

// ErrPath is the kind of every error of ResolvePath.
var ErrPath = errors.New("invalid path")

type pathError string

func (e pathError) Error() string        { return string(e) }
func (e pathError) Is(target error) bool { return target == ErrPath }

// ResolvePath makes the path a client sent absolute and clean. Nothing stands
// for workdir, or home when there is no workdir; "~" and "~/x" and relative
// paths start at home, as they do in a login shell.
func ResolvePath(path, home, workdir string) (string, error) {
	if path == "" {
		path = workdir
	}
	switch {
	case strings.IndexByte(path, 0) >= 0:
		return "", pathError("invalid path: contains a NUL byte")
	case path == "~":
		path = ""
	case strings.HasPrefix(path, "~/"):
		path = path[2:]
	case strings.HasPrefix(path, "~"):
		return "", pathError("invalid path: the home directory of another user cannot be named with ~")
	case filepath.IsAbs(path):
		return filepath.Clean(path), nil
	}
	// The leading slash keeps the result absolute whatever the account
	// database says about home.
	return filepath.Join("/", home, path), nil
}
