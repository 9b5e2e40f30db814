package files

import (
	"encoding/json"
	"io"
	"math"
	"net/http"
	"os"
	"path/filepath"

	"github.com/wrenn/wrenn/internal/envd/atomicfile"
	"github.com/wrenn/wrenn/internal/envd/user"
)

// maxComposeBody bounds the list of sources, in bytes.
const maxComposeBody = 16 << 20

type composeRequest struct {
	SourcePaths []string `json:"source_paths"`
	Destination string   `json:"destination"`
	Username    string   `json:"username"`
}

// Compose serves POST /files/compose: it concatenates files into one and
// removes them, so that big files can be uploaded in parts. The token is checked
// by the caller.
func (h *Handler) Compose(w http.ResponseWriter, r *http.Request) {
	entry, err := h.compose(w, r)
	if err != nil {
		h.fail(w, r, err)
		return
	}
	WriteJSON(w, http.StatusOK, entry)
}

func (h *Handler) compose(w http.ResponseWriter, r *http.Request) (written, error) {
	req, err := parseCompose(http.MaxBytesReader(w, r.Body, maxComposeBody))
	if err != nil {
		return written{}, err
	}
	u, err := h.user(req.Username, r)
	if err != nil {
		return written{}, err
	}
	destination, err := h.resolve(req.Destination, u)
	if err != nil {
		return written{}, err
	}
	sources, err := h.composeSources(req.SourcePaths, destination, u)
	if err != nil {
		return written{}, err
	}
	removeDirs, err := atomicfile.MakeDirs(filepath.Dir(destination), int(u.UID), int(u.GID))
	if err != nil {
		return written{}, err
	}
	options := atomicfile.Options{UID: int(u.UID), GID: int(u.GID)}
	err = atomicfile.Write(destination, options, func(w io.Writer) error {
		for _, source := range sources {
			if err := appendFile(w, source); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		removeDirs()
		return written{}, err
	}
	for _, source := range sources {
		if err := os.Remove(source); err != nil && !os.IsNotExist(err) {
			h.log.Warn("composed file's part not removed", "path", source, "error", err)
		}
	}
	return written{Name: filepath.Base(destination), Path: destination, Type: "file"}, nil
}

func parseCompose(body io.Reader) (composeRequest, error) {
	var req composeRequest
	if err := json.NewDecoder(body).Decode(&req); err != nil {
		return req, failf(http.StatusBadRequest, "invalid request body: %w", err)
	}
	if len(req.SourcePaths) == 0 {
		return req, failf(http.StatusBadRequest, "source_paths must not be empty")
	}
	if req.Destination == "" {
		return req, failf(http.StatusBadRequest, "destination is required")
	}
	return req, nil
}

func (h *Handler) composeSources(paths []string, destination string, u user.User) ([]string, error) {
	sources := make([]string, 0, len(paths))
	there, _ := os.Stat(destination) // nil when there is none, as there may
	for _, path := range paths {
		source, err := h.resolve(path, u)
		if err != nil {
			return nil, err
		}
		if source == destination {
			return nil, failf(http.StatusBadRequest, "source path %q cannot be the same as destination", path)
		}
		info, err := os.Stat(source)
		if os.IsNotExist(err) {
			return nil, failf(http.StatusNotFound, "source file not found: %s", path)
		} else if err != nil {
			return nil, err
		}
		if !info.Mode().IsRegular() {
			return nil, failf(http.StatusBadRequest, "source path is not a regular file: %s", path)
		}
		if there != nil && os.SameFile(info, there) {
			return nil, failf(http.StatusBadRequest, "source path %q is the destination by another name", path)
		}
		sources = append(sources, source)
	}
	return sources, nil
}

func appendFile(w io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = atomicfile.Append(w, f, math.MaxInt64)
	return err
}
