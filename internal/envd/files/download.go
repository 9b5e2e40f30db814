package files

import (
	"compress/gzip"
	"io"
	"mime"
	"net/http"
	"os"
	"path/filepath"

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
	// Looked at before it is opened: opening a FIFO would wait for a writer.
	info, err := os.Stat(path)
	if os.IsNotExist(err) {
		return failf(http.StatusNotFound, "path '%s' does not exist", path)
	} else if err != nil {
		return err
	}
	if info.IsDir() {
		return failf(http.StatusBadRequest, "path '%s' is a directory", path)
	}
	accepted := parseAcceptEncoding(r.Header.Values("Accept-Encoding"))
	useGzip := accepted.prefersGzip()
	if partial(r.Header) {
		useGzip = false
	}
	if !useGzip && !accepted.identity() {
		return failf(http.StatusNotAcceptable, "no acceptable encoding for path '%s': gzip and identity are offered", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	header := w.Header()
	header.Set("Vary", "Accept-Encoding")
	header.Set("Content-Disposition", mime.FormatMediaType("inline", map[string]string{"filename": filepath.Base(path)}))
	switch {
	case useGzip:
		h.sendGzip(w, path, f)
	case info.Mode().IsRegular() && (info.Size() > 0 || partial(r.Header)):
		http.ServeContent(w, r, path, info.ModTime(), f)
	default: // devices, pipes, and /proc, whose files have content but no size
		header.Set("Content-Type", contentType(path))
		_, _ = io.Copy(w, f)
	}
	return nil
}

func (h *Handler) sendGzip(w http.ResponseWriter, path string, f *os.File) {
	w.Header().Set("Content-Encoding", "gzip")
	w.Header().Set("Content-Type", contentType(path))
	// The sandbox's processors are dearer than the bytes on its link.
	zw, _ := gzip.NewWriterLevel(w, gzip.BestSpeed) // fails for unknown levels only
	if _, err := io.Copy(zw, f); err != nil {
		// The status is sent. Without its end the client sees that the stream broke.
		h.log.Warn("file not sent completely", "path", path, "error", err)
		panic(http.ErrAbortHandler)
	}
	_ = zw.Close()
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
	for _, name := range []string{"Range", "If-Range", "If-Modified-Since", "If-None-Match"} {
		if h.Get(name) != "" {
			return true
		}
	}
	return false
}
