// Package files moves whole files in and out of the sandbox over plain HTTP.
package files

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"syscall"
	"time"

	"github.com/wrenn/wrenn/internal/envd/access"
	"github.com/wrenn/wrenn/internal/envd/atomicfile"
	"github.com/wrenn/wrenn/internal/envd/filemeta"
	"github.com/wrenn/wrenn/internal/envd/settings"
	"github.com/wrenn/wrenn/internal/envd/user"
)

// Handler serves /files and /files/compose. It checks access itself, since a
// signature may stand for the token.
type Handler struct {
	guard    *access.Guard
	settings *settings.Settings
	log      *slog.Logger
}

// NewHandler returns the handler.
func NewHandler(guard *access.Guard, s *settings.Settings, log *slog.Logger) *Handler {
	return &Handler{guard: guard, settings: s, log: log}
}

// failure is an error with the status that the client gets.
type failure struct {
	status int
	err    error
}

func (f failure) Error() string { return f.err.Error() }
func (f failure) Unwrap() error { return f.err }

func failf(status int, format string, args ...any) error {
	return failure{status: status, err: fmt.Errorf(format, args...)}
}

// statusOf finds the status for an error of the file system.
func statusOf(err error) int {
	if f := (failure{}); errors.As(err, &f) {
		return f.status
	}
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return http.StatusInsufficientStorage
	case errors.Is(err, fs.ErrNotExist):
		return http.StatusNotFound
	case errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ENAMETOOLONG),
		errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENXIO), errors.Is(err, atomicfile.ErrSpecial),
		errors.Is(err, user.ErrPath), errors.Is(err, filemeta.ErrInvalid):
		return http.StatusBadRequest
	}
	return http.StatusInternalServerError
}

func (h *Handler) fail(w http.ResponseWriter, r *http.Request, err error) {
	status := statusOf(err)
	if status >= http.StatusInternalServerError {
		h.log.Error("file transfer failed", "method", r.Method, "path", r.URL.Query().Get("path"), "error", err)
	}
	WriteError(w, status, err)
}

// WriteError answers with an error in the shape that clients read.
func WriteError(w http.ResponseWriter, status int, err error) {
	text := err.Error()
	if status == http.StatusInsufficientStorage {
		text = "not enough disk space available"
	}
	WriteJSON(w, status, map[string]any{"code": status, "message": text})
}

// WriteJSON answers with v.
func WriteJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // fails only when the client has gone
}

// allow checks access and finds the user that the request acts as.
func (h *Handler) allow(r *http.Request, query url.Values, op access.Operation) (user.User, error) {
	if err := h.guard.CheckFile(r.Header, query, op, time.Now()); err != nil {
		return user.User{}, failure{http.StatusUnauthorized, err}
	}
	name := query.Get("username")
	if name == "" && query.Has("signature") {
		name = h.settings.User() // the header's user is not part of what was signed
	}
	return h.user(name, r)
}

func (h *Handler) user(name string, r *http.Request) (user.User, error) {
	if name == "" {
		name = user.NameFrom(r.Context(), h.settings.User())
	}
	u, err := user.Lookup(name)
	if unknown := (user.UnknownError{}); errors.As(err, &unknown) {
		return user.User{}, failf(http.StatusUnauthorized, "error looking up user '%s': %w", name, err)
	}
	return u, err
}

func (h *Handler) resolve(path string, u user.User) (string, error) {
	return user.ResolvePath(path, u.Home, h.settings.Workdir())
}
