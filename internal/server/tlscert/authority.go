package tlscert

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	authorityLifetime = 10 * 365 * 24 * time.Hour
	// Clients whose clocks are a little slow take new certificates all the same.
	backdate = time.Hour
)

// Authority is a certificate authority for one machine. Clients that trust it
// trust it for its domains and nothing else: the names are in its certificate, so
// that who steals its key can pose as this platform, but not as a bank.
type Authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey // nil: only to be looked at
}

// newAuthority makes one for names at and below localhost and the given domains.
func newAuthority(domains []string) (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	machine, err := os.Hostname()
	if err != nil {
		machine = "this machine"
	}
	now := time.Now()
	domains = append([]string{"localhost"}, domains...)
	slices.Sort(domains)
	template := &x509.Certificate{
		// The time tells two authorities of one machine apart in clients' stores.
		Subject: pkix.Name{
			Organization: []string{"Wrenn"},
			CommonName:   fmt.Sprintf("Wrenn CA of %.32s, %s", machine, now.UTC().Format("2006-01-02 15:04:05")),
		},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(authorityLifetime),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:     true, BasicConstraintsValid: true, MaxPathLenZero: true,
		PermittedDNSDomainsCritical: true,
		PermittedDNSDomains:         slices.Compact(domains),
		ExcludedIPRanges: []*net.IPNet{
			{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
			{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
		},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &Authority{cert, key}, nil
}

// parseAuthority reads what encode wrote.
func parseAuthority(data []byte) (*Authority, error) {
	pair, err := tls.X509KeyPair(data, data) // also compares the two
	if err != nil {
		return nil, err
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !isAuthority(pair.Leaf) {
		return nil, errForeign
	}
	return &Authority{pair.Leaf, key}, nil
}

var errForeign = errors.New("not an authority that wrenn made")

func isAuthority(cert *x509.Certificate) bool { return cert.IsCA && len(cert.PermittedDNSDomains) > 0 }

// encode returns certificate and private key.
func (a *Authority) encode() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		return nil, err
	}
	return append(a.PEM(), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})...), nil
}

// PEM returns the certificate, which clients are to trust.
func (a *Authority) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// Domains are the names at and below which it may sign.
func (a *Authority) Domains() []string { return a.cert.PermittedDNSDomains }

// Expires says until when its certificates are any good.
func (a *Authority) Expires() time.Time { return a.cert.NotAfter }

// MayServe says what is in the way of certificates for host.
func (a *Authority) MayServe(host string) error {
	if !covers(a.Domains(), host) {
		return fmt.Errorf("the certificate authority of this machine is not for %s (it is for %s): make another with `wrenn ca --new --domain %s`, and have clients trust that one",
			host, strings.Join(a.Domains(), ", "), host)
	}
	if time.Now().After(a.Expires()) {
		return fmt.Errorf("the certificate authority of this machine ended on %s: make another with `wrenn ca --new --domain %s`, and have clients trust that one",
			a.Expires().Format(time.DateOnly), host)
	}
	return nil
}

// issue makes a key and a server certificate for host and everything one label
// below it.
func (a *Authority) issue(host string, lifetime time.Duration) (*tls.Certificate, error) {
	if err := a.MayServe(host); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:   pkix.Name{CommonName: clip64(host)},
		DNSNames:  []string{host, "*." + host},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(lifetime),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	// Never outside of the authority's own time: some clients refuse that.
	if template.NotBefore.Before(a.cert.NotBefore) {
		template.NotBefore = a.cert.NotBefore
	}
	if template.NotAfter.After(a.cert.NotAfter) {
		template.NotAfter = a.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate for %s: %w", host, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign certificate for %s: %w", host, err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}

// clip64 keeps to the limit of a common name. Clients look at DNSNames.
func clip64(s string) string { return s[:min(len(s), 64)] }
