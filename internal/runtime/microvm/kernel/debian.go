package kernel

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// packageName is what the package of one kernel may be called.
var packageName = regexp.MustCompile(`^linux-image-[0-9][a-z0-9.+-]*$`)

// fetchDistribution gets the distribution's kernel for virtual machines into dir,
// by the host's own apt: from the mirrors it is set up for, signatures checked.
func fetchDistribution(ctx context.Context, dir string, progress io.Writer) (source, error) {
	for _, program := range []string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(program); err != nil {
			return source{}, sandbox.Errorf(sandbox.ErrUnavailable,
				"%s is missing, so the distribution's kernel cannot be had: give one of your own with --vmlinux", program)
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return source{}, err
	}
	deb, err := download(ctx, dir, nil, progress)
	if err != nil {
		// What the host's apt knows may be nothing, or of long ago. It is asked again with
		// lists of its own, so that the host's stay as they are.
		own := []string{"-o", "Dir::State::Lists=" + filepath.Join(dir, "lists"), "-o", "Dir::Cache=" + filepath.Join(dir, "cache")}
		if err := os.MkdirAll(filepath.Join(dir, "lists", "partial"), 0o755); err != nil {
			return source{}, err
		}
		fmt.Fprintln(progress, "asking the distribution's mirrors what there is")
		// One mirror of many that does not answer is no matter if it is another's package.
		_, stale := run(ctx, dir, "apt-get", append(own, "-q", "update")...)
		if deb, err = download(ctx, dir, own, progress); err != nil {
			return source{}, errors.Join(err, stale)
		}
	}
	name := strings.TrimSuffix(filepath.Base(deb), ".deb")
	fmt.Fprintln(progress, "unpacking", name)
	src, err := unpackPackage(ctx, deb, filepath.Join(dir, "unpacked"))
	if err != nil {
		return source{}, fmt.Errorf("unpack %s: %w", name, err)
	}
	src.name = name
	return src, nil
}

// download downloads the newest package and returns its path.
func download(ctx context.Context, dir string, flags []string, progress io.Writer) (string, error) {
	meta := "linux-image-cloud-" + runtime.GOARCH
	depends, err := run(ctx, dir, "apt-cache", append(flags, "depends", "--important", meta)...)
	if err != nil {
		return "", err
	}
	var name string
	for word := range strings.FieldsSeq(depends) {
		if packageName.MatchString(word) {
			name = word
			break
		}
	}
	if name == "" {
		return "", sandbox.Errorf(sandbox.ErrUnavailable,
			"this host's apt knows no package %s: give a kernel of your own with --vmlinux and --modules", meta)
	}
	fmt.Fprintln(progress, "downloading", name)
	// As root: apt's own user cannot write here, and apt warns of it.
	if _, err := run(ctx, dir, "apt-get", append(flags, "-q", "-o", "APT::Sandbox::User=root", "download", name)...); err != nil {
		return "", err
	}
	found, err := filepath.Glob(filepath.Join(dir, name+"_*.deb"))
	if err != nil {
		return "", err
	}
	if len(found) != 1 {
		return "", fmt.Errorf("apt-get download %s left %d packages", name, len(found))
	}
	return found[0], nil
}

// run runs a program in dir and returns what it printed.
func run(ctx context.Context, dir, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		return "", fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, bytes.TrimSpace(said.Bytes()))
	}
	return out.String(), nil
}

// unpackPackage takes the kernel and its modules out of a package. Nothing of the
// package is run, and nothing is written outside dir.
func unpackPackage(ctx context.Context, deb, dir string) (source, error) {
	src := source{modules: filepath.Join(dir, "modules")}
	if err := os.MkdirAll(src.modules, 0o755); err != nil {
		return source{}, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		return source{}, err
	}
	if err := cmd.Start(); err != nil {
		return source{}, err
	}
	readErr := src.read(tar.NewReader(out), dir)
	if readErr != nil {
		cancel() // else it waits for a reader
	} else {
		_, readErr = io.Copy(io.Discard, out) // the archive's padding
	}
	if err := cmd.Wait(); readErr == nil && err != nil {
		return source{}, fmt.Errorf("dpkg-deb: %w: %s", err, bytes.TrimSpace(said.Bytes()))
	}
	if readErr != nil {
		return source{}, readErr
	}
	if src.image == "" {
		return source{}, errors.New("there is no kernel in it")
	}
	return src, nil
}

func (s *source) read(archive *tar.Reader, dir string) error {
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := path.Clean("/" + h.Name)
		var to string
		switch {
		case h.Typeflag != tar.TypeReg:
			continue
		case strings.HasPrefix(name, "/boot/vmlinuz-"):
			to = filepath.Join(dir, vmlinuzName)
			s.image = to
		case strings.Contains(name, "/lib/modules/") && strings.Contains(path.Base(name), ".ko"):
			// Names of modules are unique in a kernel.
			to = filepath.Join(s.modules, path.Base(name))
		default:
			continue
		}
		if err := save(to, archive); err != nil {
			return err
		}
	}
}

func save(path string, r io.Reader) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
