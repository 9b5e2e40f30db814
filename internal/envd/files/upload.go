package files

import (
	"compress/gzip"
	"errors"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"strings"

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
	body := io.Reader(r.Body)
	switch encoding := strings.ToLower(strings.TrimSpace(r.Header.Get("Content-Encoding"))); encoding {
	case "", "identity":
	case "gzip":
		zr, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, failf(http.StatusBadRequest, "body is not gzip: %w", err)
		}
		defer zr.Close()
		body = badInput{zr}
	default:
		return nil, failf(http.StatusBadRequest, "content encoding %q is not supported: send gzip or identity", encoding)
	}
	mediaType, params, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if mediaType == "multipart/form-data" {
		if params["boundary"] == "" {
			return nil, failf(http.StatusBadRequest, "multipart body without boundary")
		}
		return h.uploadParts(multipart.NewReader(body, params["boundary"]), query.Get("path"), u, meta)
	}
	// Anything else is the file itself; octet-stream is what clients say.
	if query.Get("path") == "" {
		return nil, failf(http.StatusBadRequest, "path is required")
	}
	entry, err := h.store(query.Get("path"), u, meta, body)
	if err != nil {
		return nil, err
	}
	return []written{entry}, nil
}

// uploadParts stores every part called "file": under the query's path when there
// is one, else each under its own file name.
func (h *Handler) uploadParts(parts *multipart.Reader, path string, u user.User, meta map[string]string) ([]written, error) {
	entries := []written{}
	for {
		part, err := parts.NextPart()
		if errors.Is(err, io.EOF) {
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
		entry, err := h.store(target, u, meta, badInput{part})
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

// store writes one file, which appears complete or not at all.
func (h *Handler) store(target string, u user.User, meta map[string]string, body io.Reader) (written, error) {
	path, err := h.resolve(target, u)
	if err != nil {
		return written{}, err
	}
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return written{}, failf(http.StatusBadRequest, "path is a directory: %s", path)
	}
	if err := atomicfile.MakeDirs(filepath.Dir(path), int(u.UID), int(u.GID)); err != nil {
		return written{}, err
	}
	options := atomicfile.Options{UID: int(u.UID), GID: int(u.GID)}
	if len(meta) > 0 {
		options.Finish = func(f *os.File) error { return filemeta.Write(int(f.Fd()), meta) }
	}
	err = atomicfile.Write(path, options, func(w io.Writer) error {
		_, err := io.Copy(w, body)
		return err
	})
	if err != nil {
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
