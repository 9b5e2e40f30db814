package tlscert

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"time"
)

// DefaultLifetime is how long a certificate of the machine's own authority is
// good for; another takes its place when a third of it is left. Browsers refuse
// more than 398 days.
const DefaultLifetime = 30 * 24 * time.Hour

// LocalConfig is what a Local needs.
type LocalConfig struct {
	Files  Files
	Domain string // of the platform, may have a port
	Log    *slog.Logger
	// Lifetime of a certificate; zero means DefaultLifetime.
	Lifetime time.Duration
}

// Local serves certificates of the machine's own authority for a domain and its
// wildcard. They are made when they are needed, in less than a millisecond, and
// kept in memory alone.
type Local struct {
	files    Files
	host     string
	lifetime time.Duration
	log      *slog.Logger

	mu     sync.Mutex
	served *tls.Certificate
	stamp  fileStamp // of the authority that signed it, or that was tried last
	renew  time.Time // when to make another
}

// fileStamp tells versions of a file apart.
type fileStamp struct {
	modified time.Time
	size     int64
}

func stampOf(path string) fileStamp {
	fi, err := os.Stat(path)
	if err != nil {
		return fileStamp{}
	}
	return fileStamp{fi.ModTime(), fi.Size()}
}

// NewLocal opens the authority, makes it where there is none, and makes the first
// certificate.
func NewLocal(cfg LocalConfig) (*Local, error) {
	host, err := Hostname(cfg.Domain)
	if err != nil {
		return nil, err
	}
	l := &Local{files: cfg.Files, host: host, lifetime: cfg.Lifetime, log: cfg.Log}
	if l.lifetime == 0 {
		l.lifetime = DefaultLifetime
	}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	if _, err := l.files.Open(host); err != nil {
		return nil, err
	}
	l.stamp = stampOf(l.files.Private) // before it is read: what comes later is seen
	authority, err := l.files.read()
	if err != nil {
		return nil, err
	}
	if err := l.issue(authority); err != nil {
		return nil, err
	}
	l.log.Info("serving TLS with this machine's own authority", "domain", host, "authority", l.files.Public,
		"until", authority.Expires().Format(time.DateOnly))
	return l, nil
}

// TLSConfig returns a configuration that serves the certificate to everybody,
// also to clients that ask for no name.
func (l *Local) TLSConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return l.current(), nil
		},
	}
}

// current returns the certificate: another one when it is time to, or when the
// authority has been replaced. While the authority is unusable the last one stays.
func (l *Local) current() *tls.Certificate {
	l.mu.Lock()
	defer l.mu.Unlock()
	stamp := stampOf(l.files.Private)
	if stamp == l.stamp && time.Now().Before(l.renew) {
		return l.served
	}
	l.stamp = stamp
	authority, err := l.files.read()
	if err == nil {
		err = l.issue(authority)
	}
	if err != nil {
		l.renew = time.Now().Add(min(l.lifetime/100, time.Minute))
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: restore it from a backup, or make another with `wrenn ca --new`", err)
		}
		l.log.Warn("keeping the old TLS certificate", "until", l.served.Leaf.NotAfter, "err", err)
	}
	return l.served
}

// issue makes the certificate to serve.
func (l *Local) issue(authority *Authority) error {
	made, err := authority.issue(l.host, l.lifetime)
	if err != nil {
		return err
	}
	l.served = made
	// What is left of the authority's own time counts too.
	l.renew = time.Now().Add(time.Until(made.Leaf.NotAfter) * 2 / 3)
	return nil
}
