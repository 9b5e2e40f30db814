// Package tlscert gets the certificates that the operator does not bring along:
// from an authority made for this machine (Authority, Local), and from an ACME
// server such as Let's Encrypt (ACME). Both give a tls.Config to serve with and
// renew what they serve by themselves.
package tlscert

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// Hostname returns the host name of a platform's domain, which may have a port:
// certificates have none. It refuses what no client would take a certificate for:
// addresses, and names of one label, below which browsers and Node.js accept no
// wildcard.
func Hostname(domain string) (string, error) {
	host := domain
	if h, _, err := net.SplitHostPort(domain); err == nil {
		host = h
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if _, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return "", fmt.Errorf("domain %q is an address: TLS needs a name, such as sandboxes.example.com or e2b.localhost", domain)
	}
	labels := strings.Split(host, ".")
	for _, label := range labels {
		if !validLabel(label) {
			return "", fmt.Errorf("domain %q is no host name: want letters, digits, hyphens and dots (international names in their xn-- form)", domain)
		}
	}
	// Names of hosts below it are longer by "{port}-{id}.", 26 characters.
	if len(host) > 253-26 {
		return "", fmt.Errorf("domain %q is too long", domain)
	}
	if len(labels) < 2 {
		return "", fmt.Errorf("domain %q has one label only, and clients accept no certificate for *.%s: take a name below it, such as e2b.%s", domain, host, host)
	}
	return host, nil
}

func validLabel(label string) bool {
	if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
		return false
	}
	for _, c := range []byte(label) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// covers reports whether host is one of the domains or below one.
func covers(domains []string, host string) bool {
	for _, d := range domains {
		if host == d || strings.HasSuffix(host, "."+d) {
			return true
		}
	}
	return false
}
