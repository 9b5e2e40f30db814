package files

import (
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/envd/access"
)

// Download serves GET /files.
func (h *Handler) Download(w http.ResponseWriter, r *http.Request) {
	if err := h.download(w, r); err != nil {
		h.fail(w, r, err)
	}
}

func (h *Handler) download(w http.ResponseWriter, r *http.Request) error {
	query := r.URL.Query()
	u, err := h.allow(r, query, access.Read)
	if err != nil {
		return err
	}
	path, err := h.resolve(query.Get("path"), u)
	if err != nil {
		return err
	}
	if err := checkReadable(path); err != nil {
		return err
	}
	accepted := parseAcceptEncoding(r.Header.Values("Accept-Encoding"))
	useGzip := accepted.prefersGzip() && !partial(r.Header)
	if !useGzip && !accepted.identity() {
		return failf(http.StatusNotAcceptable, "no acceptable encoding for path '%s': gzip and identity are offered", path)
	}
	// Opening a pipe or a terminal must not wait for its other end.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	header := w.Header()
	header.Set("Vary", "Accept-Encoding")
	header.Set("Content-Disposition", mime.FormatMediaType("inline", map[string]string{"filename": filepath.Base(path)}))
	info, err := f.Stat()
	if err != nil {
		return err
	}
	// Files of /proc are regular and have content, but no size.
	stored := info.Mode().IsRegular() && (info.Size() > 0 || partial(r.Header)) && !madeUp(f)
	if useGzip && stored && accepted.identity() && !compressible(f, info.Size()) {
		useGzip = false
	}
	switch {
	case useGzip:
		h.sendGzip(w, r, path, f)
	case stored:
		header.Set("ETag", etag(info))
		http.ServeContent(w, r, path, info.ModTime(), f)
	default:
		return h.sendStream(w, r, path, f)
	}
	return nil
}

// checkReadable returns an error for the client unless path is what can be sent.
func checkReadable(path string) error {
	info, err := os.Stat(path)
	switch {
	case os.IsNotExist(err):
		return failf(http.StatusNotFound, "path '%s' does not exist", path)
	case err != nil:
		return err
	case info.IsDir():
		return failf(http.StatusBadRequest, "path '%s' is a directory", path)
	case info.Mode()&fs.ModeSocket != 0:
		return failf(http.StatusBadRequest, "path '%s' is a socket", path)
	}
	return nil
}

// madeUp reports whether the size of f is not that of its content: files of
// /sys all have a page.
func madeUp(f *os.File) bool {
	var stat unix.Statfs_t
	return unix.Fstatfs(int(f.Fd()), &stat) == nil && stat.Type == unix.SYSFS_MAGIC
}

// sendStream sends what has no size that could be told.
func (h *Handler) sendStream(w http.ResponseWriter, r *http.Request, path string, f *os.File) error {
	w.Header().Set("Content-Type", contentType(path))
	if r.Method == http.MethodHead {
		return nil
	}
	// A pipe without a word must not be waited for longer than the client does.
	stop := context.AfterFunc(r.Context(), func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	switch n, err := io.Copy(w, f); {
	case err != nil && n == 0:
		return err
	case err != nil:
		h.breakOff(path, err)
	}
	return nil
}

// breakOff ends an answer whose status is sent. Without its end the client sees
// that it is not all.
func (h *Handler) breakOff(path string, err error) {
	h.log.Warn("file not sent completely", "path", path, "error", err)
	panic(http.ErrAbortHandler)
}

// etag names the content: a file that is replaced is another one, and one that
// is changed has another time.
func etag(info fs.FileInfo) string {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	return fmt.Sprintf(`"%x-%x-%x-%x"`, stat.Ino, info.Size(), info.ModTime().UnixNano(), stat.Ctim.Nano())
}

// zippers are kept: each takes about 1 MiB.
var zippers = sync.Pool{New: func() any {
	// The sandbox's processors are dearer than the bytes on its link.
	zw, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed) // fails for unknown levels only
	return zw
}}

func (h *Handler) sendGzip(w http.ResponseWriter, r *http.Request, path string, f *os.File) {
	w.Header().Set("Content-Encoding", "gzip")
	w.Header().Set("Content-Type", contentType(path))
	if r.Method == http.MethodHead {
		return
	}
	zw := zippers.Get().(*gzip.Writer)
	defer zippers.Put(zw)
	zw.Reset(w)
	stop := context.AfterFunc(r.Context(), func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := io.Copy(zw, f); err != nil {
		h.breakOff(path, err)
	}
	_ = zw.Close()
}

// compressible reports whether a file is worth compressing, by a look at its
// middle: archives and pictures are not, and sending them as they are takes a
// fifth of the time.
func compressible(f *os.File, size int64) bool {
	const sample = 32 << 10
	if size < 4*sample {
		return true
	}
	data := make([]byte, sample)
	if _, err := f.ReadAt(data, size/2); err != nil {
		return true
	}
	var count counter
	zw := zippers.Get().(*gzip.Writer)
	defer zippers.Put(zw)
	zw.Reset(&count)
	_, _ = zw.Write(data)
	_ = zw.Close()
	return count < sample*15/16
}

type counter int

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

func contentType(path string) string {
	if t := mime.TypeByExtension(filepath.Ext(path)); t != "" {
		return t
	}
	return "application/octet-stream"
}

// partial reports whether the answer depends on the stored bytes' own positions
// and times, which an encoding would change.
func partial(h http.Header) bool {
	for _, name := range []string{"Range", "If-Range", "If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since"} {
		if h.Get(name) != "" {
			return true
		}
	}
	return false
}
