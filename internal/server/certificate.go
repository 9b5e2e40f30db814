package server

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Certificate is a certificate pair on disk that may be renewed while the server
// runs: every handshake looks whether the files have changed.
type Certificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu     sync.Mutex
	loaded *tls.Certificate
	stamp  fileStamps // of the files when they were last read, well or not
}

// fileStamps tells versions of the two files apart.
type fileStamps struct{ cert, key fileStamp }

type fileStamp struct {
	modified time.Time
	size     int64
}

// LoadCertificate reads a PEM certificate chain and its key.
func LoadCertificate(certFile, keyFile string, log *slog.Logger) (*Certificate, error) {
	c := &Certificate{certFile: certFile, keyFile: keyFile, log: log}
	stamp, err := c.stamps()
	if err == nil {
		err = c.load(stamp)
	}
	if err != nil {
		return nil, fmt.Errorf("load TLS certificate: %w", err)
	}
	return c, nil
}

// TLSConfig returns a configuration that serves the certificate.
func (c *Certificate) TLSConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return c.current(), nil
		},
	}
}

// current returns the certificate, read again if the files have changed. While
// they are unusable (half-written, say) the last good one stays.
func (c *Certificate) current() *tls.Certificate {
	c.mu.Lock()
	defer c.mu.Unlock()
	stamp, err := c.stamps()
	if err == nil && stamp != c.stamp {
		err = c.load(stamp)
	}
	if err != nil {
		c.log.Warn("keeping the old TLS certificate", "error", err)
	}
	return c.loaded
}

func (c *Certificate) load(stamp fileStamps) error {
	c.stamp = stamp
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return err
	}
	c.loaded = &pair
	return nil
}

func (c *Certificate) stamps() (fileStamps, error) {
	cert, err := os.Stat(c.certFile)
	if err != nil {
		return fileStamps{}, err
	}
	key, err := os.Stat(c.keyFile)
	if err != nil {
		return fileStamps{}, err
	}
	return fileStamps{
		cert: fileStamp{cert.ModTime(), cert.Size()},
		key:  fileStamp{key.ModTime(), key.Size()},
	}, nil
}
