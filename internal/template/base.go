package template

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/artifact"
)

// What a build of the base template takes while it is made, with room to spare.
const (
	buildBytes  = 2 << 30
	buildInodes = 100_000
)

// EnsureBase returns the base template's build for this host: in milliseconds
// when it is there, else after making it, which takes a minute or two, the
// network, and root. Of several processes that ask for the same build at once
// one makes it and the others wait.
func EnsureBase(ctx context.Context, cfg Config) (Build, error) {
	r, err := baseRecipe(cfg.TrustHostCAs, hostCADir)
	if err != nil {
		return Build{}, err
	}
	b, err := ensure(ctx, cfg, r, build)
	if err != nil {
		return Build{}, fmt.Errorf("make the base template: %w", err)
	}
	return b, nil
}

// ensure returns the build of r, calling build when it is not there yet.
func ensure(ctx context.Context, cfg Config, r recipe, build buildFunc) (Build, error) {
	if b, err := read(cfg.Dir, r.id()); !errors.Is(err, fs.ErrNotExist) {
		return b, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return Build{}, err
	}
	p := newProgress(cfg.Progress)
	unlock, err := artifact.Lock(ctx, cfg.Dir, func() {
		p.line("another process is building the template; waiting for it")
	})
	if err != nil {
		return Build{}, err
	}
	defer unlock()
	if b, err := read(cfg.Dir, r.id()); !errors.Is(err, fs.ErrNotExist) {
		return b, err // made while we waited
	}
	// The mounts of a build that was killed went with its namespaces.
	if err := artifact.RemoveLeftovers(cfg.Dir); err != nil {
		return Build{}, err
	}
	if err := checkRoom(cfg.Dir); err != nil {
		return Build{}, err
	}
	tmp, err := os.MkdirTemp(cfg.Dir, artifact.TempPrefix)
	if err != nil {
		return Build{}, err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return Build{}, err
	}
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	started := time.Now()
	log.Info("building template", "alias", BaseAlias, "build", r.id())
	if err := build(ctx, r, tmp, filepath.Join(cfg.Dir, "build.log"), p); err != nil {
		return Build{}, err
	}
	b, err := publish(ctx, cfg.Dir, tmp, r)
	if err != nil {
		return Build{}, err
	}
	took := time.Since(started)
	p.line("template %s is ready: %d packages, %d MiB, %.0f s", b.Alias, len(b.Packages), b.SizeBytes>>20, took.Seconds())
	log.Info("built template", "alias", b.Alias, "build", b.ID, "digest", b.Digest, "took", took)
	return b, nil
}

// publish describes the finished tree in tmp and gives it its final name. All of
// it is on disk before it has that name.
func publish(ctx context.Context, dir, tmp string, r recipe) (Build, error) {
	root := filepath.Join(tmp, rootfsName)
	digest, size, err := digestTree(ctx, root)
	if err != nil {
		return Build{}, err
	}
	packages, err := installedPackages(root)
	if err != nil {
		return Build{}, err
	}
	data, err := json.MarshalIndent(Build{
		ID: r.id(), TemplateID: IDOf(BaseAlias), Alias: BaseAlias,
		CPUs: 2, MemoryMiB: 512, DiskMiB: 10240,
		DefaultUser: "user", DefaultWorkdir: "/home/user", Env: r.env(),
		Created: time.Now().UTC(), Digest: digest, SizeBytes: size, Packages: packages,
	}, "", "  ")
	if err != nil {
		return Build{}, err
	}
	if err := os.WriteFile(filepath.Join(tmp, manifestName), append(data, '\n'), 0o644); err != nil {
		return Build{}, err
	}
	if err := artifact.Sync(tmp); err != nil {
		return Build{}, err
	}
	final := filepath.Join(dir, r.id())
	if err := os.RemoveAll(final); err != nil { // a directory without build.json: no build
		return Build{}, err
	}
	if err := os.Rename(tmp, final); err != nil {
		return Build{}, err
	}
	if err := artifact.Sync(dir); err != nil {
		return Build{}, err
	}
	return read(dir, r.id())
}

// installedPackages reads the package database of the tree at root.
func installedPackages(root string) (map[string]string, error) {
	data, err := os.ReadFile(filepath.Join(root, "var/lib/dpkg/status"))
	if err != nil {
		return nil, err
	}
	packages := map[string]string{}
	var name string
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch key {
		case "Package":
			name = value
		case "Version":
			packages[name] = value
		}
	}
	return packages, nil
}

func checkRoom(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("look at the free space of %s: %w", dir, err)
	}
	if free := st.Bavail * uint64(st.Bsize); free < buildBytes {
		return fmt.Errorf("%s has %d MiB free and a build needs %d: free some, or choose another data directory", dir, free>>20, buildBytes>>20)
	}
	if st.Files > 0 && st.Ffree < buildInodes { // file systems without a fixed number of inodes say 0
		return fmt.Errorf("%s has %d inodes free and a build needs %d: remove files, or choose another data directory", dir, st.Ffree, buildInodes)
	}
	return nil
}
