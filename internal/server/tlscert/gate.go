package tlscert

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

const (
	// certificatesPerSandbox bounds how many ports of one sandbox get one, and with
	// it what somebody who knows a sandbox's id can make the ACME server refuse to
	// everybody else: those servers count certificates by domain.
	certificatesPerSandbox = 10
	// The count is forgotten when so many sandboxes have been counted.
	sandboxesCounted = 4096
	// After a failure clients' handshakes do not ask the ACME server again for so
	// long: browsers try at once and again, and servers count failures too.
	pauseAfterFailure = time.Minute
)

// gate decides which names get a certificate when a client asks for them.
type gate struct {
	host   string // the platform's domain
	exists func(ctx context.Context, id string) error

	mu       sync.Mutex
	admitted map[string]map[string]time.Time // by sandbox id and name: when the last attempt failed
}

// admit returns nil for "{port}-{id}.{host}" of a sandbox that exists.
func (g *gate) admit(ctx context.Context, name string) error {
	label, ok := strings.CutSuffix(name, "."+g.host)
	if !ok {
		return fmt.Errorf("not below %s", g.host)
	}
	id, err := sandboxOf(label)
	if err != nil {
		return err
	}
	if g.exists == nil {
		return errors.New("no sandbox has one")
	}
	if err := g.exists(ctx, string(id)); err != nil {
		return fmt.Errorf("sandbox %s: %w", id, err)
	}
	return g.count(string(id), name)
}

func (g *gate) count(id, name string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	failed, counted := g.admitted[id][name]
	switch {
	case counted && time.Since(failed) < pauseAfterFailure:
		return errors.New("the last attempt failed a moment ago")
	case counted:
		return nil
	case len(g.admitted[id]) >= certificatesPerSandbox:
		return fmt.Errorf("sandbox %s has certificates for %d ports: more needs a wildcard certificate (--acme-dns)", id, certificatesPerSandbox)
	}
	if g.admitted == nil || len(g.admitted) >= sandboxesCounted {
		g.admitted = make(map[string]map[string]time.Time)
	}
	if g.admitted[id] == nil {
		g.admitted[id] = make(map[string]time.Time)
	}
	g.admitted[id][name] = time.Time{}
	return nil
}

// failed tells that there was no certificate to be had for a name.
func (g *gate) failed(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, names := range g.admitted {
		if _, ok := names[name]; ok {
			names[name] = time.Now()
		}
	}
}

// sandboxOf reads "{port}-{id}", also with the third part that old clients add.
func sandboxOf(label string) (sandbox.ID, error) {
	parts := strings.Split(label, "-")
	if len(parts) < 2 || len(parts) > 3 || !isPort(parts[0]) {
		return "", errors.New("no host of a sandbox")
	}
	return sandbox.ParseID(parts[1])
}

func isPort(s string) bool {
	n := 0
	for _, c := range []byte(s) {
		if c < '0' || c > '9' || n > 65535 {
			return false
		}
		n = 10*n + int(c-'0')
	}
	return s != "" && s[0] != '0' && n <= 65535
}
