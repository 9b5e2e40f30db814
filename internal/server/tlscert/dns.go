package tlscert

import (
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/libdns/libdns"
)

// DNSProvider puts the records into a zone by which an ACME server sees that the
// domain is ours, and takes them out again.
type DNSProvider interface {
	libdns.RecordAppender
	libdns.RecordDeleter
}

// dnsProviders are the names that --acme-dns takes. Another provider is a file
// like cloudflare.go and a line here; packages made for libdns fit in as they are.
var dnsProviders = map[string]func() (DNSProvider, error){
	"cloudflare": newCloudflare,
	"rfc2136":    newRFC2136,
}

// KnownDNSProvider returns an error that names those that there are, when there is
// none of that name.
func KnownDNSProvider(name string) error {
	if _, ok := dnsProviders[name]; !ok {
		return fmt.Errorf("no DNS provider %q: there are %s", name, strings.Join(slices.Sorted(maps.Keys(dnsProviders)), ", "))
	}
	return nil
}

// NewDNSProvider returns the one of that name, with what its variables say.
func NewDNSProvider(name string) (DNSProvider, error) {
	if err := KnownDNSProvider(name); err != nil {
		return nil, err
	}
	provider, err := dnsProviders[name]()
	if err != nil {
		return nil, fmt.Errorf("DNS provider %s: %w", name, err)
	}
	return provider, nil
}

// DNSResolver returns the resolver that the variable ACME_DNS_RESOLVER names, with
// its port, or nothing.
func DNSResolver() (string, error) {
	addr, err := setting("ACME_DNS_RESOLVER")
	if err != nil || addr == "" {
		return "", err
	}
	return withPort(addr, "53"), nil
}

// withPort adds the port that is usual to an address that has none.
func withPort(addr, port string) string {
	if _, _, err := net.SplitHostPort(addr); err == nil {
		return addr
	}
	return net.JoinHostPort(strings.Trim(addr, "[]"), port)
}

// setting reads the environment variable NAME, or the file that NAME_FILE names.
// The variable is gone afterwards: nothing that the platform starts is to have it.
func setting(name string) (string, error) {
	value, path := os.Getenv(name), os.Getenv(name+"_FILE")
	if value != "" || path == "" {
		return strings.TrimSpace(value), os.Unsetenv(name)
	}
	fi, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("%s_FILE: %w", name, err)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("%s_FILE: others may read %s (mode %v): chmod 600 %s", name, path, fi.Mode()&fs.ModePerm, path)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("%s_FILE: %w", name, err)
	}
	return strings.TrimSpace(string(data)), nil
}
