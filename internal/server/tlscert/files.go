package tlscert

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Files are where an Authority is kept.
type Files struct {
	Private string // certificate and key in one file, which thereby cannot disagree; its directory is for root alone
	Public  string // the certificate for clients, a copy that is made again where it is missing or another
}

// Open reads the authority. Where there is none it makes one, for names at and
// below localhost and the given domains.
func (f Files) Open(domains ...string) (*Authority, error) {
	unlock, err := f.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	a, err := f.read()
	if errors.Is(err, fs.ErrNotExist) {
		return f.make(domains)
	}
	if err != nil {
		return nil, err
	}
	return a, f.publish(a)
}

// Replace makes a new authority in place of the one that there is, if any.
// Certificates that the old one signed are no longer served from then on.
func (f Files) Replace(domains ...string) (*Authority, error) {
	unlock, err := f.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	return f.make(domains)
}

func (f Files) make(domains []string) (*Authority, error) {
	a, err := newAuthority(domains)
	if err != nil {
		return nil, fmt.Errorf("make certificate authority: %w", err)
	}
	data, err := a.encode()
	if err == nil {
		err = writeFile(f.Private, data, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("make certificate authority: %w", err)
	}
	return a, f.publish(a)
}

// read reads the authority and changes nothing but a mode that lets others read.
func (f Files) read() (*Authority, error) {
	data, err := os.ReadFile(f.Private)
	if err != nil {
		return nil, fmt.Errorf("read certificate authority: %w", err)
	}
	a, err := parseAuthority(data)
	if err != nil {
		return nil, fmt.Errorf("certificate authority %s is broken (%w): restore it from a backup, or make another with `wrenn ca --new` and have clients trust that one", f.Private, err)
	}
	if err := os.Chmod(f.Private, 0o600); err != nil {
		return nil, fmt.Errorf("make certificate authority private: %w", err)
	}
	return a, nil
}

// Published reads the certificate that everybody may read. What is returned cannot
// sign.
func (f Files) Published() (*Authority, error) {
	data, err := os.ReadFile(f.Public)
	if err != nil {
		return nil, fmt.Errorf("read certificate authority: %w", err)
	}
	var cert *x509.Certificate
	block, _ := pem.Decode(data)
	if block != nil {
		cert, err = x509.ParseCertificate(block.Bytes)
	}
	if err != nil || cert == nil || !isAuthority(cert) {
		return nil, fmt.Errorf("read certificate authority %s: %w", f.Public, errors.Join(errForeign, err))
	}
	return &Authority{cert: cert}, nil
}

func (f Files) publish(a *Authority) error {
	if there, err := os.ReadFile(f.Public); err == nil && bytes.Equal(there, a.PEM()) {
		return nil
	}
	if err := writeFile(f.Public, a.PEM(), 0o644); err != nil {
		return fmt.Errorf("publish certificate authority: %w", err)
	}
	return nil
}

// lock keeps others from making an authority at the same time. The kernel lets
// go of it when the process ends.
func (f Files) lock() (unlock func(), err error) {
	dir := filepath.Dir(f.Private)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of certificate authority: %w", err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open directory of certificate authority: %w", err)
	}
	for {
		err = unix.Flock(int(d.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("lock directory of certificate authority: %w", err)
	}
	return func() { d.Close() }, nil
}

// writeFile writes so that after a crash the file is there whole or not at all.
func writeFile(path string, data []byte, mode fs.FileMode) error {
	tmp := path + ".tmp"
	_ = os.Remove(tmp) // what a crash left may have another mode
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, werr := f.Write(data)
	// The mode whatever the umask says.
	if err := errors.Join(werr, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
