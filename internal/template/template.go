// Package template keeps the templates that sandboxes start from: their builds
// on disk, and the recipe of the base template, which is made from the
// distribution's own packages.
//
// A build is a directory DIR/<build id>/ that holds rootfs/ and build.json. It is
// made under another name and renamed when it is complete, so a directory with
// that name is always whole; from then on nobody writes to it, because every
// sandbox of the template shares it.
package template

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// BaseAlias is the name of the template that every installation has.
const BaseAlias = "base"

const (
	manifestName = "build.json"
	rootfsName   = "rootfs"
)

// Build is one immutable result of building a template.
type Build struct {
	ID         string `json:"id"`         // short hash of the recipe; also the directory's name
	TemplateID string `json:"templateID"` // 20 characters of [a-z0-9]
	Alias      string `json:"alias"`

	RootFS string `json:"-"` // absolute path of the root filesystem; shared, never written

	// What a sandbox gets when its creator does not say otherwise.
	CPUs           int               `json:"cpus"`
	MemoryMiB      int64             `json:"memoryMiB"`
	DiskMiB        int64             `json:"diskMiB"` // writable space, beside the image's own size
	DefaultUser    string            `json:"defaultUser"`
	DefaultWorkdir string            `json:"defaultWorkdir"`
	Env            map[string]string `json:"env"` // environment of every process, before the creator's

	Created   time.Time         `json:"created"`
	Digest    string            `json:"digest"` // of rootfs/, as Digest computes it
	SizeBytes int64             `json:"sizeBytes"`
	Packages  map[string]string `json:"packages"` // installed packages and their versions
}

// Config says where builds are kept and how they are made.
type Config struct {
	// Dir holds the builds; it is created when missing. Absolute path.
	Dir string

	// TrustHostCAs puts the certificate authorities that the operator added to
	// this host into the image, so that programs in it trust them too.
	TrustHostCAs bool

	Progress io.Writer    // human-readable lines while a build runs; nil for none
	Log      *slog.Logger // nil for none
}

// IDOf returns the id of the template with this alias: 20 characters of
// [a-z0-9], the same on every installation.
func IDOf(alias string) string {
	sum := sha256.Sum256([]byte("template:" + alias))
	s := new(big.Int).SetBytes(sum[:]).Text(36)
	return s[len(s)-20:]
}

// Load returns the builds in dir, the newest first. A directory that does not
// exist has none. Builds that are still being made are not seen.
func Load(dir string) ([]Build, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list builds: %w", err)
	}
	var builds []Build
	for _, e := range entries {
		if !e.IsDir() || e.Name()[0] == '.' {
			continue
		}
		b, err := read(dir, e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue // not a build
		}
		if err != nil {
			return nil, err
		}
		builds = append(builds, b)
	}
	slices.SortFunc(builds, func(a, b Build) int { return b.Created.Compare(a.Created) })
	return builds, nil
}

// read loads the build dir/id. fs.ErrNotExist means that there is none.
func read(dir, id string) (Build, error) {
	path := filepath.Join(dir, id, manifestName)
	data, err := os.ReadFile(path)
	if err != nil {
		return Build{}, fmt.Errorf("read build: %w", err)
	}
	var b Build
	if err := json.Unmarshal(data, &b); err != nil {
		return Build{}, fmt.Errorf("read build %s: %w (remove %s to have it made again)", id, err, filepath.Join(dir, id))
	}
	if b.ID != id {
		return Build{}, fmt.Errorf("read build %s: %s names build %q (remove %s to have it made again)", id, path, b.ID, filepath.Join(dir, id))
	}
	root, err := filepath.Abs(filepath.Join(dir, id, rootfsName))
	if err != nil {
		return Build{}, fmt.Errorf("find build %s: %w", id, err)
	}
	b.RootFS = root
	return b, nil
}

// Verify reads the whole root filesystem of b again and returns an error when it
// is not what was built. It takes seconds; nothing else notices a changed build.
func Verify(ctx context.Context, b Build) error {
	digest, _, err := digestTree(ctx, b.RootFS)
	if err != nil {
		return fmt.Errorf("verify build %s: %w", b.ID, err)
	}
	if digest != b.Digest {
		return fmt.Errorf("verify build %s: %s was changed after it was built (digest %.12s, built as %.12s): remove %s to have it made again",
			b.ID, b.RootFS, digest, b.Digest, filepath.Dir(b.RootFS))
	}
	return nil
}
