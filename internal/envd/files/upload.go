package files

import (
	"bufio"
	"compress/gzip"
	"errors"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/wrenn/wrenn/internal/envd/access"
	"github.com/wrenn/wrenn/internal/envd/atomicfile"
	"github.com/wrenn/wrenn/internal/envd/filemeta"
	"github.com/wrenn/wrenn/internal/envd/user"
)

// written describes a file as uploads answer it.
type written struct {
	Name     string            `json:"name"`
	Path     string            `json:"path"`
	Type     string            `json:"type"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// Upload serves POST /files.
func (h *Handler) Upload(w http.ResponseWriter, r *http.Request) {
	entries, err := h.upload(r)
	if err != nil {
		h.fail(w, r, err)
		return
	}
	WriteJSON(w, http.StatusOK, entries)
}

func (h *Handler) upload(r *http.Request) ([]written, error) {
	query := r.URL.Query()
	u, err := h.allow(r, query, access.Write)
	if err != nil {
		return nil, err
	}
	meta, err := filemeta.FromHeader(r.Header)
	if err != nil {
		return nil, err
	}
	body, size, done, err := decoded(r)
	if err != nil {
		return nil, err
	}
	defer done()
	mediaType, params, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if mediaType == "multipart/form-data" {
		if params["boundary"] == "" {
			return nil, failf(http.StatusBadRequest, "multipart body without boundary")
		}
		buffered := borrow(body)
		defer giveBack(buffered)
		return h.uploadParts(multipart.NewReader(buffered, params["boundary"]), query.Get("path"), u, meta)
	}
	// Anything else is the file itself; octet-stream is what clients say.
	if query.Get("path") == "" {
		return nil, failf(http.StatusBadRequest, "path is required")
	}
	entry, err := h.store(query.Get("path"), u, meta, body, size)
	if err != nil {
		return nil, err
	}
	return []written{entry}, nil
}

// decoded returns the request's body without its content encoding, and its size,
// 0 when that is not known. Done gives back what it takes.
func decoded(r *http.Request) (body io.Reader, size int64, done func(), err error) {
	switch encoding := strings.ToLower(strings.TrimSpace(r.Header.Get("Content-Encoding"))); encoding {
	case "", "identity":
		return badInput{r.Body}, max(r.ContentLength, 0), func() {}, nil
	case "gzip":
		buffered := borrow(r.Body)
		zr, err := gzip.NewReader(buffered)
		if err != nil {
			giveBack(buffered)
			return nil, 0, nil, failf(http.StatusBadRequest, "body is not gzip: %w", err)
		}
		return badInput{zr}, 0, func() { giveBack(buffered) }, nil
	default:
		return nil, 0, nil, failf(http.StatusBadRequest, "content encoding %q is not supported: send gzip or identity", encoding)
	}
}

// uploadParts stores every part called "file": under the query's path when there
// is one, else each under its own file name.
func (h *Handler) uploadParts(parts *multipart.Reader, path string, u user.User, meta map[string]string) ([]written, error) {
	entries := []written{}
	for {
		part, err := parts.NextPart()
		if err == io.EOF { //nolint:errorlint // a wrapped one is a form that does not end
			return entries, nil
		}
		if err != nil {
			return nil, failf(http.StatusBadRequest, "error parsing multipart form: %w", err)
		}
		// The part's own FileName method takes the directories off.
		_, params, err := mime.ParseMediaType(part.Header.Get("Content-Disposition"))
		if err != nil || params["name"] != "file" {
			continue
		}
		target := path
		if target == "" {
			target = params["filename"]
		}
		if target == "" {
			return nil, failf(http.StatusBadRequest, "no path given: neither in the query nor as the part's file name")
		}
		if path != "" && len(entries) > 0 {
			return nil, failf(http.StatusBadRequest, "more than one file for path '%s'", path)
		}
		entry, err := h.store(target, u, meta, badInput{part}, 0)
		if err != nil {
			return nil, err
		}
		for _, earlier := range entries {
			if earlier.Path == entry.Path {
				return nil, failf(http.StatusBadRequest, "more than one file for path '%s'", entry.Path)
			}
		}
		entries = append(entries, entry)
	}
}

// store writes one file, which appears complete or not at all. Size is how long
// body is, 0 when that is not known.
func (h *Handler) store(target string, u user.User, meta map[string]string, body io.Reader, size int64) (written, error) {
	path, err := h.resolve(target, u)
	if err != nil {
		return written{}, err
	}
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return written{}, failf(http.StatusBadRequest, "path is a directory: %s", path)
	}
	removeDirs, err := atomicfile.MakeDirs(filepath.Dir(path), int(u.UID), int(u.GID))
	if err != nil {
		return written{}, err
	}
	options := atomicfile.Options{UID: int(u.UID), GID: int(u.GID), Size: size}
	if len(meta) > 0 {
		options.Finish = func(f *os.File) error { return filemeta.Write(int(f.Fd()), meta) }
	}
	err = atomicfile.Write(path, options, func(w io.Writer) error {
		_, err := io.Copy(w, body)
		return err
	})
	if err != nil {
		removeDirs()
		return written{}, err
	}
	return written{Name: filepath.Base(path), Path: path, Type: "file", Metadata: meta}, nil
}

// badInput marks what goes wrong while reading a body as the client's doing.
type badInput struct{ io.Reader }

func (b badInput) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = failf(http.StatusBadRequest, "error reading body: %w", err)
	}
	return n, err
}

// readers are kept for what reads its input in small pieces: the parsers of
// multipart and gzip.
var readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, 256<<10) }}

func borrow(r io.Reader) *bufio.Reader {
	b := readers.Get().(*bufio.Reader)
	b.Reset(r)
	return b
}

func giveBack(b *bufio.Reader) {
	b.Reset(nil)
	readers.Put(b)
}
