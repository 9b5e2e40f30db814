package envd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/wrenn/wrenn/internal/envd/access"
	"github.com/wrenn/wrenn/internal/envd/files"
	"github.com/wrenn/wrenn/internal/envd/machine"
)

// maxInitBody bounds what the host sends, in bytes.
const maxInitBody = 16 << 20

// eventsHost is the name under which E2B's programs find the host's events.
const eventsHost = "events.e2b.local"

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
	// LifecycleID is another one after each boot and resume.
	LifecycleID string `json:"lifecycleID"`
	// Entropy is random bytes that no other copy of the same memory gets.
	Entropy []byte `json:"entropy"`
	// CABundle holds certificate authorities to trust, in PEM.
	CABundle string `json:"caBundle"`
	// HyperloopIP is where the host takes events.
	HyperloopIP string `json:"hyperloopIP"`

	events netip.Addr
}

// parseInit reads a request and checks all of it, so that a bad one changes
// nothing.
func parseInit(body []byte) (initRequest, error) {
	var req initRequest
	if len(body) == 0 {
		return req, nil
	}
	if err := json.Unmarshal(body, &req); err != nil {
		return req, fmt.Errorf("invalid body: %w", err)
	}
	if err := req.check(); err != nil {
		return req, err
	}
	var err error
	if req.CABundle != "" {
		if req.CABundle, err = machine.ParseAuthorities(req.CABundle); err != nil {
			return req, fmt.Errorf("invalid caBundle: %w", err)
		}
	}
	if req.HyperloopIP != "" {
		if req.events, err = netip.ParseAddr(req.HyperloopIP); err != nil || req.events.Zone() != "" {
			return req, fmt.Errorf("invalid hyperloopIP %.100q", req.HyperloopIP)
		}
	}
	return req, nil
}

// check returns an error unless all that is plain text or numbers is valid.
func (req *initRequest) check() error {
	for name, value := range req.EnvVars {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
			return fmt.Errorf("invalid environment variable %.100q", name)
		}
	}
	for _, word := range []string{req.SandboxID, req.TemplateID, req.LifecycleID} {
		if len(word) > 256 || strings.ContainsFunc(word, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
			return fmt.Errorf("invalid id %.100q", word)
		}
	}
	if strings.ContainsAny(req.DefaultUser, "\x00\n:") || strings.Contains(req.DefaultWorkdir, "\x00") {
		return errors.New("invalid default user or working directory")
	}
	if t := req.Timestamp; t != nil && (t.Year() < 1970 || t.Year() > 2200) {
		return fmt.Errorf("invalid timestamp: the year %d", t.Year())
	}
	if len(req.Entropy) > machine.MaxEntropy {
		return fmt.Errorf("invalid entropy: more than %d bytes", machine.MaxEntropy)
	}
	return nil
}

// initializer orders the host's requests: an old one that comes late must not
// undo a younger one.
type initializer struct {
	mu        sync.Mutex
	last      time.Time
	lifecycle string
}

// resumed reports whether a request is the first after a boot or a resume. The
// caller holds mu.
func (i *initializer) resumed(req initRequest) bool {
	return req.LifecycleID != "" && req.LifecycleID != i.lifecycle
}

// serveInit serves POST /init. Once a token is set only who knows it may change
// it, or anything else.
func (a *Agent) serveInit(w http.ResponseWriter, r *http.Request) {
	arrival := time.Now()
	w.Header().Set("X-Envd-Version", Version)
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxInitBody))
	if err != nil {
		files.WriteError(w, http.StatusBadRequest, fmt.Errorf("read body: %w", err))
		return
	}
	req, err := parseInit(body)
	if err != nil {
		files.WriteError(w, http.StatusBadRequest, err)
		return
	}
	a.init.mu.Lock()
	defer a.init.mu.Unlock()
	if !a.mayInit(r, req.AccessToken) {
		a.log.Warn("init refused: wrong access token")
		files.WriteError(w, http.StatusUnauthorized, errors.New("access token does not match the one set before"))
		return
	}
	// The clock of the host may have been set back since this memory was put aside:
	// what tells of a resume is no old request, whatever its time.
	if req.Timestamp == nil || req.Timestamp.After(a.init.last) || a.init.resumed(req) {
		if err := a.apply(req, arrival, remoteAddr(r)); err != nil {
			a.log.Error("init failed", "error", err)
			files.WriteError(w, http.StatusInternalServerError, err)
			return
		}
	}
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusNoContent)
}

// mayInit decides whether a request that brings token may initialize: it knows
// the token that is set, or brings the one whose hash the machine's monitor has.
// Where there is neither, the first to come may, unless it comes from within the
// sandbox: programs there must not set its clock, nor lock its owner out.
func (a *Agent) mayInit(r *http.Request, token string) bool {
	secured := a.guard.Secured()
	if secured && (a.guard.Allows(token) || a.guard.Allows(r.Header.Get(access.TokenHeader))) {
		return true
	}
	if r.Context().Value(insideKey{}) != nil || a.machine != nil && !a.fromHost(r) {
		return false
	}
	if a.metadata != nil && a.hashedToken {
		if d, err := a.metadata.Get(r.Context()); err == nil && d.AccessTokenHash != "" {
			return d.Authorizes(token)
		}
	}
	return !secured
}

// apply does what a valid request says. What can fail comes first: on an error
// nothing else has changed.
func (a *Agent) apply(req initRequest, arrival time.Time, asker netip.AddrPort) error {
	if a.ownsMachine && req.CABundle != "" {
		if err := machine.TrustAuthorities("/", req.CABundle); err != nil {
			return err
		}
	}
	resumed := a.init.resumed(req)
	if resumed {
		a.init.lifecycle = req.LifecycleID
		a.known = req.SandboxID != "" && req.TemplateID != ""
	}
	if req.Timestamp != nil {
		a.init.last = *req.Timestamp
		a.stepClock(*req.Timestamp, arrival)
	}
	if a.ownsMachine {
		if err := machine.Reseed(req.Entropy); err != nil {
			a.log.Warn("random numbers not reseeded", "error", err)
		}
	}
	a.guard.Set(req.AccessToken)
	if req.EnvVars != nil {
		a.settings.SetEnv(req.EnvVars)
	}
	a.settings.SetDefaults(req.DefaultUser, req.DefaultWorkdir)
	a.identify(req.SandboxID, req.TemplateID)
	if req.events.IsValid() {
		a.nameEvents(req.events)
	}
	if resumed {
		a.wake(asker)
	}
	a.log.Info("initialized", "sandbox_id", req.SandboxID, "template_id", req.TemplateID, "lifecycle_id", req.LifecycleID,
		"secured", req.AccessToken != "", "default_user", a.settings.User(), "env_vars", len(req.EnvVars))
	return nil
}

// identify tells everything in the sandbox which one it is; an empty id is not
// known. A sandbox that is resumed knows it already. The caller holds init.mu.
func (a *Agent) identify(sandboxID, templateID string) {
	if !a.settings.SetIdentity(sandboxID, templateID) && a.identified {
		return
	}
	a.identified = true
	if a.ownsMachine {
		if err := a.settings.WriteIdentity("/run"); err != nil {
			a.log.Warn("sandbox's identity not written to files", "error", err)
			a.identified = false
		}
	}
	if a.name != nil && sandboxID != "" {
		if err := a.name(sandboxID); err != nil {
			a.log.Warn("hostname not set", "error", err)
			a.identified = false
		}
	}
}

// nameEvents tells programs made for E2B where the host takes events.
func (a *Agent) nameEvents(addr netip.Addr) {
	a.settings.SetEvents(addr)
	aliases := []machine.Alias{{Addr: addr, Name: eventsHost}}
	var err error
	switch {
	case a.machine != nil:
		err = a.machine.Alias(aliases)
	case a.ownsMachine:
		err = machine.WriteHosts("/etc/hosts", aliases)
	}
	if err != nil {
		a.log.Warn("host's events not named", "error", err)
	}
}

// wake repairs what a boot or resume on another host has changed, once for each.
// asker is the other end of the connection by which that is told.
func (a *Agent) wake(asker netip.AddrPort) {
	if a.machine != nil {
		if err := a.machine.Resumed(asker); err != nil {
			a.log.Warn("network not repaired after a resume", "error", err)
		}
	}
	select {
	case a.woken <- struct{}{}:
	default: // it is about to ask anyway
	}
}

// followIdentity asks the machine's monitor who it is, now and after each resume,
// until ctx ends or the host has told it in the meantime.
func (a *Agent) followIdentity(ctx context.Context) {
	for ctx.Err() == nil {
		asking, cancel := context.WithCancel(ctx)
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			a.askIdentity(asking)
		}()
		select { // what is under way asks the monitor of before the resume
		case <-a.woken:
		case <-ctx.Done():
		}
		cancel()
		<-answered
	}
}

func (a *Agent) askIdentity(ctx context.Context) {
	if a.isKnown() {
		return
	}
	d, err := a.metadata.Wait(ctx)
	if err != nil {
		return
	}
	a.init.mu.Lock()
	defer a.init.mu.Unlock()
	if !a.known { // what the host tells by itself is younger
		a.identify(d.SandboxID, d.TemplateID)
	}
}

func (a *Agent) isKnown() bool {
	a.init.mu.Lock()
	defer a.init.mu.Unlock()
	return a.known
}
