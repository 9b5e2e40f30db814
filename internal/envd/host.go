package envd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/envd/access"
	"github.com/wrenn/wrenn/internal/envd/files"
	"github.com/wrenn/wrenn/internal/envd/settings"
)

// maxInitBody bounds what the host sends, in bytes.
const maxInitBody = 16 << 20

// initRequest is what the host tells the agent after boot and every resume.
// Unknown fields are ignored.
type initRequest struct {
	AccessToken    string            `json:"accessToken"`
	EnvVars        map[string]string `json:"envVars"`
	Timestamp      *time.Time        `json:"timestamp"`
	DefaultUser    string            `json:"defaultUser"`
	DefaultWorkdir string            `json:"defaultWorkdir"`
	SandboxID      string            `json:"sandboxID"`
	TemplateID     string            `json:"templateID"`
}

// initializer orders the host's requests: an old one that comes late must not
// undo a younger one.
type initializer struct {
	mu   sync.Mutex
	last time.Time
}

// serveInit serves POST /init. Once a token is set only who knows it may change
// it, or anything else.
func (a *Agent) serveInit(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Envd-Version", Version)
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxInitBody))
	if err != nil {
		files.WriteError(w, http.StatusBadRequest, fmt.Errorf("read body: %w", err))
		return
	}
	var req initRequest
	if len(body) > 0 {
		if err := json.Unmarshal(body, &req); err != nil {
			files.WriteError(w, http.StatusBadRequest, fmt.Errorf("invalid body: %w", err))
			return
		}
	}
	a.init.mu.Lock()
	defer a.init.mu.Unlock()
	if !a.guard.Allows(req.AccessToken) && !a.guard.Allows(r.Header.Get(access.TokenHeader)) {
		a.log.Warn("init refused: wrong access token")
		files.WriteError(w, http.StatusUnauthorized, errors.New("access token does not match the one set before"))
		return
	}
	if req.Timestamp == nil || req.Timestamp.After(a.init.last) {
		a.apply(req)
	}
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusNoContent)
}

func (a *Agent) apply(req initRequest) {
	if req.Timestamp != nil {
		a.init.last = *req.Timestamp
		a.stepClock(*req.Timestamp)
	}
	a.guard.Set(req.AccessToken)
	if req.EnvVars != nil {
		a.settings.SetEnv(req.EnvVars)
	}
	a.settings.SetDefaults(req.DefaultUser, req.DefaultWorkdir)
	a.settings.SetIdentity(req.SandboxID, req.TemplateID)
	if a.ownsMachine {
		if err := a.settings.WriteIdentity(settings.RunDir); err != nil {
			a.log.Warn("sandbox's identity not written to files", "error", err)
		}
	}
	a.log.Info("initialized", "sandbox_id", req.SandboxID, "template_id", req.TemplateID,
		"secured", req.AccessToken != "", "default_user", a.settings.User(), "env_vars", len(req.EnvVars))
}

// stepClock sets the clock to the host's when it is off by more than the
// request's way here explains: after a resume it stands where it was. Where the
// sandbox may not set its clock, the host's own is used and right. An agent that
// is not pid 1 shares a clock that is not the sandbox's, and leaves it alone.
func (a *Agent) stepClock(now time.Time) {
	if !a.ownsMachine {
		return
	}
	const maxBehind, maxAhead = 50 * time.Millisecond, 5 * time.Second
	if behind := time.Until(now); behind <= maxBehind && behind >= -maxAhead {
		return
	}
	ts, err := unix.TimeToTimespec(now)
	if err == nil {
		err = unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
	}
	if err != nil && !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.ENOSYS) {
		a.log.Warn("clock not set", "error", err)
	}
}

func (a *Agent) serveMetrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	files.WriteJSON(w, http.StatusOK, a.meter.Measure())
}

func (a *Agent) serveEnvs(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	files.WriteJSON(w, http.StatusOK, a.settings.Env())
}

// serveLogs serves GET /logs?after=<unix ns>.
func (a *Agent) serveLogs(w http.ResponseWriter, r *http.Request) {
	var after int64
	if s := r.URL.Query().Get("after"); s != "" {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			files.WriteError(w, http.StatusBadRequest, errors.New("after must be a time in unix nanoseconds"))
			return
		}
		after = n
	}
	w.Header().Set("Cache-Control", "no-store")
	files.WriteJSON(w, http.StatusOK, a.ring.After(after))
}

// IsInit reports whether this process is the sandbox's pid 1.
func IsInit() bool { return os.Getpid() == 1 }
