package guest

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// The directory holds a README besides, so that the package compiles in a tree
// where the guest agent has not been built yet.
//
//go:embed bin
var embedded embed.FS

// Install writes the guest agent that is embedded in this program into dir,
// under a name that has its content hash, and returns its path. A file that is
// there already is used as it is: running sandboxes may have it open.
func Install(dir string) (string, error) {
	bin, err := embedded.ReadFile("bin/envd")
	if errors.Is(err, fs.ErrNotExist) {
		return "", errors.New("this wrenn was built without its guest agent: build it with `make build`")
	}
	if err != nil {
		return "", fmt.Errorf("read embedded guest agent: %w", err)
	}
	sum := sha256.Sum256(bin)
	path := filepath.Join(dir, "envd-"+hex.EncodeToString(sum[:8]))
	if fi, err := os.Stat(path); err == nil && fi.Size() == int64(len(bin)) {
		return path, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make directory for guest agent: %w", err)
	}
	tmp, err := os.CreateTemp(dir, ".envd-")
	if err != nil {
		return "", fmt.Errorf("write guest agent: %w", err)
	}
	defer os.Remove(tmp.Name())
	_, werr := tmp.Write(bin)
	if err := errors.Join(werr, tmp.Chmod(0o755), tmp.Sync(), tmp.Close()); err != nil {
		return "", fmt.Errorf("write guest agent: %w", err)
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return "", fmt.Errorf("install guest agent: %w", err)
	}
	return path, nil
}
