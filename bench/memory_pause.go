package bench

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"

	"github.com/wrenn/wrenn/internal/memory"
)

// measurePause writes what a process has dirtied of its memory as an image over
// another, beside writing as many bytes to a file, both to the disk itself.
func (b *memoryBench) measurePause(ctx context.Context) (err error) {
	size := b.PauseMiB * mebibyte
	base := filepath.Join(b.dir, "base")
	if err := os.WriteFile(base, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(base, int64(size)); err != nil {
		return err
	}
	pages := rand.Perm(size / 4096)[:size/4096*dirtyPercent/100]
	slices.Sort(pages)
	a, done, c, err := b.child(ctx, memoryOrder{Mode: "dirty", File: base, Size: size, Pages: pages})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	parent := filepath.Join(b.dir, "parent")
	if err := os.Mkdir(parent, 0o700); err != nil {
		return err
	}
	if err := memory.Write(ctx, parent, int64(size), nil, memory.SparseFile{Size: 0}); err != nil {
		return err
	}
	img, err := memory.Open(parent)
	if err != nil {
		return err
	}
	defer img.Close()
	source := memory.ProcessMemory{
		PID:      c.cmd.Process.Pid,
		Segments: []memory.Segment{{Address: a.Address, Range: memory.Range{Length: int64(size)}}},
	}
	data := make([]byte, len(pages)*4096)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(data) // never fails
	var took, floor samples
	var stored int64
	for range b.Samples {
		d, err := timed(func() error { return writeSynced(filepath.Join(b.dir, "floor"), data) })
		if err != nil {
			return err
		}
		floor.addMillis(d)
		dir := filepath.Join(b.dir, "pause")
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		if d, err = timed(func() error { return memory.Write(ctx, dir, int64(size), img, source) }); err != nil {
			return err
		}
		took.addMillis(d)
		if stored, err = sizeOf(dir); err != nil {
			return err
		}
		if err := errors.Join(os.RemoveAll(dir), os.Remove(filepath.Join(b.dir, "floor"))); err != nil {
			return err
		}
	}
	over := 100 * (float64(stored)/float64(len(data)) - 1)
	b.report(
		took.result("pause: memory written", "ms").against(floor, 1.3).noted("%d MiB, %d %% of it dirty", b.PauseMiB, dirtyPercent),
		single("pause: image over dirty bytes", "%", over).want("≤ 1", over <= 1),
	)
	return nil
}

func writeSynced(path string, data []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Sync()
}

// sizeOf is the size of the files of a directory.
func sizeOf(dir string) (int64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var n int64
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil {
			return 0, err
		}
		n += fi.Size()
	}
	return n, nil
}
