package kernel

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/artifact"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Options say which kernel to install. The zero value is the distribution's for
// virtual machines, of the newest version that this host's apt knows.
type Options struct {
	Vmlinux  string    // file of an own kernel, ELF or bzImage
	Modules  string    // directory with its modules; empty: everything is built in
	Progress io.Writer // where to say how far it is; nil: nowhere
}

// Install installs a kernel in dir and makes it the current one. Installing what
// is there already changes nothing else; of several processes that install at once
// the others wait.
func Install(ctx context.Context, dir string, opts Options) (Kernel, error) {
	k, err := install(ctx, dir, opts)
	if err != nil {
		return Kernel{}, fmt.Errorf("install kernel: %w", err)
	}
	return k, nil
}

func install(ctx context.Context, dir string, opts Options) (Kernel, error) {
	if opts.Modules != "" && opts.Vmlinux == "" {
		return Kernel{}, sandbox.Errorf(sandbox.ErrInvalid, "modules are those of one kernel: give its vmlinux too")
	}
	if opts.Progress == nil {
		opts.Progress = io.Discard
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Kernel{}, err
	}
	unlock, err := artifact.Lock(ctx, dir, nil)
	if err != nil {
		return Kernel{}, err
	}
	defer unlock()
	if err := artifact.RemoveLeftovers(dir); err != nil {
		return Kernel{}, err
	}
	tmp, err := os.MkdirTemp(dir, artifact.TempPrefix)
	if err != nil {
		return Kernel{}, err
	}
	defer os.RemoveAll(tmp)
	src := source{image: opts.Vmlinux, modules: opts.Modules, name: opts.Vmlinux}
	if opts.Vmlinux == "" {
		if src, err = fetchDistribution(ctx, filepath.Join(tmp, "package"), opts.Progress); err != nil {
			return Kernel{}, err
		}
	}
	return publish(ctx, dir, filepath.Join(tmp, "kernel"), src)
}

// source is where a kernel is made from.
type source struct {
	image   string // file: ELF or bzImage
	modules string // directory; empty: none
	name    string // for kernel.json
}

// publish makes the kernel's directory in tmp and gives it its final name, then
// makes it the current one.
func publish(ctx context.Context, dir, tmp string, src source) (Kernel, error) {
	image, err := os.ReadFile(src.image)
	if err != nil {
		return Kernel{}, err
	}
	vmlinux, err := uncompress(ctx, image)
	if err != nil {
		return Kernel{}, err
	}
	k := Kernel{Source: src.name, Installed: time.Now().UTC().Truncate(time.Second)}
	if k.Version, err = releaseOf(vmlinux); err != nil {
		return Kernel{}, err
	}
	if k.PVH, err = hasPVH(vmlinux); err != nil {
		return Kernel{}, err
	}
	sum := sha256.Sum256(vmlinux)
	k.SHA256 = hex.EncodeToString(sum[:])
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return Kernel{}, err
	}
	if src.modules != "" {
		if k.Modules, err = copyModules(src.modules, filepath.Join(tmp, modulesName)); err != nil {
			return Kernel{}, err
		}
	}
	if k.Name, err = nameOf(k, filepath.Join(tmp, modulesName)); err != nil {
		return Kernel{}, err
	}
	if err := writeFile(filepath.Join(tmp, vmlinuxName), vmlinux); err != nil {
		return Kernel{}, err
	}
	if len(image) != len(vmlinux) { // it was packed
		if err := writeFile(filepath.Join(tmp, vmlinuzName), image); err != nil {
			return Kernel{}, err
		}
	}
	manifest, err := json.MarshalIndent(k, "", "  ")
	if err != nil {
		return Kernel{}, err
	}
	if err := writeFile(filepath.Join(tmp, manifestName), append(manifest, '\n')); err != nil {
		return Kernel{}, err
	}
	if _, err := ensureInitramfs(tmp, k.Modules); err != nil {
		return Kernel{}, err
	}
	if err := artifact.Sync(tmp); err != nil {
		return Kernel{}, err
	}
	if err := replaceDirectory(tmp, filepath.Join(dir, k.Name)); err != nil {
		return Kernel{}, err
	}
	if err := replaceLink(filepath.Join(dir, currentName), k.Name); err != nil {
		return Kernel{}, err
	}
	if err := artifact.Sync(dir); err != nil {
		return Kernel{}, err
	}
	k, err = read(dir, k.Name)
	k.Current = true
	return k, err
}

// nameOf names a kernel by what it is made of.
func nameOf(k Kernel, modules string) (string, error) {
	sum := sha256.New()
	io.WriteString(sum, k.SHA256)
	for _, module := range k.Modules {
		data, err := os.ReadFile(filepath.Join(modules, module))
		if err != nil {
			return "", err
		}
		fmt.Fprintf(sum, " %s %x", module, sha256.Sum256(data))
	}
	return k.Version + "-" + hex.EncodeToString(sum.Sum(nil))[:8], nil
}

// replaceDirectory gives the directory from the name to, whether or not there is
// one: machines that start meanwhile see the one or the other.
func replaceDirectory(from, to string) error {
	err := os.Rename(from, to)
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	if err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("replace %s: %w", to, err)
	}
	return os.RemoveAll(from)
}

func replaceLink(path, target string) error {
	tmp := filepath.Join(filepath.Dir(path), artifact.TempPrefix+filepath.Base(path))
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// writeFile writes beside path and renames.
func writeFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), artifact.TempPrefix)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err := errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
