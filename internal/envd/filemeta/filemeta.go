// Package filemeta keeps a file's metadata, short texts that clients attach to
// it, in its extended attributes.
package filemeta

import (
	"errors"
	"fmt"
	"net/http"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	attrPrefix   = "user.e2b."
	headerPrefix = "X-Metadata-"
	maxKey       = 246  // with the prefix an attribute name may have 255 bytes
	maxTotal     = 4096 // what file systems commonly hold per file
)

// ErrInvalid is the kind of the errors about metadata that cannot be stored.
var ErrInvalid = errors.New("invalid metadata")

// FromHeader returns the metadata of an upload, keys in lower case. The error is
// of kind ErrInvalid.
func FromHeader(header http.Header) (map[string]string, error) {
	var meta map[string]string
	total := 0
	for name, values := range header {
		key, ok := strings.CutPrefix(name, headerPrefix)
		if !ok {
			continue
		}
		key = strings.ToLower(key)
		value := values[0]
		if key == "" || len(key) > maxKey {
			return nil, fmt.Errorf("%w: key %.64q must have 1 to %d characters", ErrInvalid, key, maxKey)
		}
		if !printable(key) || !printable(value) {
			return nil, fmt.Errorf("%w: key and value of %.64q must be printable ASCII", ErrInvalid, key)
		}
		if total += len(attrPrefix) + len(key) + len(value); total > maxTotal {
			return nil, fmt.Errorf("%w: more than %d bytes in total", ErrInvalid, maxTotal)
		}
		if meta == nil {
			meta = make(map[string]string)
		}
		meta[key] = value
	}
	return meta, nil
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// Write attaches metadata to the open file fd.
func Write(fd int, meta map[string]string) error {
	for key, value := range meta {
		if err := unix.Fsetxattr(fd, attrPrefix+key, []byte(value), 0); err != nil {
			return fmt.Errorf("set metadata %q: %w", key, err)
		}
	}
	return nil
}

// Read returns the metadata of the file at path, nil when it has none or it
// cannot be told; links are not followed.
func Read(path string) map[string]string {
	size, err := unix.Llistxattr(path, nil)
	if err != nil || size == 0 {
		return nil
	}
	names := make([]byte, size)
	if size, err = unix.Llistxattr(path, names); err != nil {
		return nil
	}
	var meta map[string]string
	for name := range strings.SplitSeq(string(names[:size]), "\x00") {
		key, ok := strings.CutPrefix(name, attrPrefix)
		if !ok || key == "" {
			continue
		}
		value, err := readOne(path, name)
		if err != nil {
			continue
		}
		if meta == nil {
			meta = make(map[string]string)
		}
		meta[strings.ToValidUTF8(key, "\uFFFD")] = strings.ToValidUTF8(value, "\uFFFD")
	}
	return meta
}

func readOne(path, name string) (string, error) {
	buf := make([]byte, maxTotal)
	n, err := unix.Lgetxattr(path, name, buf)
	if err == unix.ERANGE { // set by somebody else, larger than ours can be
		buf = make([]byte, 64<<10)
		n, err = unix.Lgetxattr(path, name, buf)
	}
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}
