package machine

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// MaxAuthorities bounds what ParseAuthorities takes, in bytes.
const MaxAuthorities = 1 << 20

// bundles are where distributions keep the certificate authorities that their
// programs trust.
var bundles = []string{
	"etc/ssl/certs/ca-certificates.crt", // Debian, Ubuntu, Alpine, Arch
	"etc/pki/tls/certs/ca-bundle.crt",   // Fedora, RHEL
	"etc/ssl/ca-bundle.pem",             // SUSE
	"etc/ssl/cert.pem",                  // Alpine's own TLS library
}

// ParseAuthorities checks that text holds certificates in PEM and nothing else,
// and returns them in their plain form.
func ParseAuthorities(text string) (string, error) {
	if len(text) > MaxAuthorities {
		return "", fmt.Errorf("certificates of more than %d bytes", MaxAuthorities)
	}
	var plain strings.Builder
	for rest := []byte(text); ; {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			if strings.Contains(string(rest), "-----BEGIN") {
				return "", errors.New("a certificate that is not PEM")
			}
			break
		}
		if block.Type != "CERTIFICATE" {
			return "", fmt.Errorf("%.40q where a certificate is wanted", block.Type)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return "", fmt.Errorf("parse certificate: %w", err)
		}
		plain.Write(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes}))
	}
	if plain.Len() == 0 {
		return "", errors.New("no certificate")
	}
	return plain.String(), nil
}

// TrustAuthorities adds certificates, as ParseAuthorities returned them, to those
// that the system below root trusts. Those added the last time go.
func TrustAuthorities(root, certificates string) error {
	files := make(map[string]bool) // some of the names are links to the same file
	for _, name := range bundles {
		if path, err := filepath.EvalSymlinks(filepath.Join(root, name)); err == nil {
			files[path] = true
		}
	}
	if len(files) == 0 {
		files[filepath.Join(root, bundles[0])] = true
	}
	for path := range files {
		old, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("read trusted certificates: %w", err)
		}
		text := withBlock(withoutBlock(string(old)), blockBegin+certificates+blockEnd)
		if err := writeFile(path, text); err != nil {
			return fmt.Errorf("write trusted certificates: %w", err)
		}
	}
	return nil
}
