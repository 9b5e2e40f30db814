package bench

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// pattern is the content of the files: random, so that nothing on the way can
// make it smaller, and the same block again and again, so that making and
// checking it costs little.
var pattern = func() []byte {
	block := make([]byte, mebibyte)
	_, _ = rand.NewChaCha8([32]byte{}).Read(block) // never fails
	return block
}()

// repeated reads a block again and again, up to size bytes.
func repeated(block []byte, size int64) io.Reader {
	return io.LimitReader(&repeater{block: block}, size)
}

type repeater struct {
	block []byte
	at    int // in block
}

func (r *repeater) Read(p []byte) (int, error) {
	n := copy(p, r.block[r.at:])
	r.at = (r.at + n) % len(r.block)
	return n, nil
}

// checker is a writer that wants the block again and again.
type checker struct {
	block []byte
	n     int64 // bytes that were right
}

func (c *checker) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		want := c.block[c.n%int64(len(c.block)):]
		want = want[:min(len(want), len(p))]
		if !bytes.Equal(p[:len(want)], want) {
			return written, fmt.Errorf("content is wrong between byte %d and %d", c.n, c.n+int64(len(want)))
		}
		c.n += int64(len(want))
		written += len(want)
		p = p[len(want):]
	}
	return written, nil
}

// want is an error unless exactly n bytes came.
func (c *checker) want(n int64) error {
	if c.n != n {
		return fmt.Errorf("%d bytes came instead of %d", c.n, n)
	}
	return nil
}

// rate is in MiB/s.
func (s *samples) addRate(bytes int64, d time.Duration) { *s = append(*s, mib(bytes)/d.Seconds()) }

// measureTransfers uploads and downloads files. Floors are a server that does
// io.Copy, in turn with the agent and with the same client and the same disk.
func (b *envdBench) measureTransfers(ctx context.Context) error {
	size := int64(b.SizeMiB) * mebibyte
	path := filepath.Join(b.dir, "file")
	defer os.Remove(path)
	uploads := []struct {
		name string
		rate samples
		send func() error
	}{
		{"plain floor", nil, func() error { return b.floorUpload(ctx, "file", size) }},
		{"floor with fsync", nil, func() error { return b.floorUpload(ctx, "file?sync", size) }},
		{"upload", nil, func() error { return b.upload(ctx, path, size) }},
		{"multipart upload", nil, func() error { return b.uploadMultipart(ctx, path, size) }},
	}
	var down, floor samples
	for i := range b.Transfers {
		for j := range uploads {
			// Each comes first as often as the others: a disk may be busy with what it
			// has taken for longer than it says, and slower after much of it.
			j = (i + j) % len(uploads)
			u := &uploads[j]
			if err := b.emptyDisk(path); err != nil {
				return err
			}
			took, err := timed(u.send)
			if err == nil {
				err = checkFile(path, size)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", u.name, err)
			}
			u.rate.addRate(size, took)
		}
		// The file that is there now, read from memory by both.
		took, err := timed(func() error { return b.floorDownload(ctx, "file", size) })
		if err != nil {
			return fmt.Errorf("floor's download: %w", err)
		}
		floor.addRate(size, took)
		if took, err = timed(func() error { return b.download(ctx, path, size) }); err != nil {
			return fmt.Errorf("download: %w", err)
		}
		down.addRate(size, took)
		progress("envd: transfers: %d of %d", i+1, b.Transfers)
	}
	plain, synced, up, multipart := uploads[0].rate, uploads[1].rate, uploads[2].rate, uploads[3].rate
	b.report(
		up.result("upload", "MiB/s").atLeast(plain, 0.7).
			noted("%d MiB, octet-stream, synced to disk; floor: io.Copy to a file over loopback HTTP, not synced; in %s", b.SizeMiB, b.where()),
		up.result("upload, floor synced", "MiB/s").beside(synced).noted("the same against a floor that ends with fsync, as our upload does"),
		multipart.result("upload, multipart", "MiB/s").beside(plain).noted("floor as of upload"),
		down.result("download", "MiB/s").atLeast(floor, 0.7).
			noted("%d MiB from the page cache; floor: io.Copy of the same file over loopback HTTP (sendfile)", b.SizeMiB),
	)
	return nil
}

// emptyDisk removes the last sample's file and waits until the disk has nothing
// more to do for it.
func (b *envdBench) emptyDisk(path string) error {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	dir, err := os.Open(b.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return fmt.Errorf("settle disk: %w", err)
	}
	return nil
}

func checkFile(path string, size int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return check(f, size)
}

// check reads size bytes of the pattern from r.
func check(r io.Reader, size int64) error {
	c := &checker{block: pattern}
	if _, err := io.CopyBuffer(c, struct{ io.Reader }{r}, make([]byte, 256<<10)); err != nil {
		return err
	}
	return c.want(size)
}

func (b *envdBench) floorUpload(ctx context.Context, name string, size int64) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, b.floor.url+"/files/"+name, repeated(pattern, size))
	if err != nil {
		return err
	}
	r.ContentLength = size
	return finish(do(b.floor.http, r, http.StatusOK))
}

func (b *envdBench) floorDownload(ctx context.Context, name string, size int64) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, b.floor.url+"/files/"+name, nil)
	if err != nil {
		return err
	}
	resp, err := do(b.floor.http, r, http.StatusOK)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return check(resp.Body, size)
}

func (b *envdBench) upload(ctx context.Context, path string, size int64) error {
	return finish(b.agent.wire.request(ctx, http.MethodPost, filePath(path), "application/octet-stream",
		repeated(pattern, size), size, http.StatusOK))
}

func (b *envdBench) uploadMultipart(ctx context.Context, path string, size int64) error {
	const (
		boundary = "wrenn-bench-boundary"
		head     = "--" + boundary + "\r\nContent-Disposition: form-data; name=\"file\"; filename=\"file\"\r\n" +
			"Content-Type: application/octet-stream\r\n\r\n"
		tail = "\r\n--" + boundary + "--\r\n"
	)
	body := io.MultiReader(bytes.NewReader([]byte(head)), repeated(pattern, size), bytes.NewReader([]byte(tail)))
	return finish(b.agent.wire.request(ctx, http.MethodPost, filePath(path), "multipart/form-data; boundary="+boundary,
		body, int64(len(head))+size+int64(len(tail)), http.StatusOK))
}

func (b *envdBench) download(ctx context.Context, path string, size int64) error {
	resp, err := b.agent.wire.request(ctx, http.MethodGet, filePath(path), "", nil, 0, http.StatusOK)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return check(resp.Body, size)
}
