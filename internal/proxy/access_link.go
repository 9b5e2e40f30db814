package proxy

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// LinkParameter is where a URL has its preview link.
	LinkParameter = "wrenn_preview"
	linkCookie    = LinkParameter + "_" // and the port: paths do not part ports on one host
	linkVersion   = "v1"
)

// What is said of links that let nobody in. That one has expired is said only
// where it was good once.
const (
	linkExpired = "The preview link has expired"
	linkInvalid = "The preview link is not valid for this address"
)

// SignLink returns a preview link to a port: the value of LinkParameter that lets
// its bearer in until expires, which counts in whole seconds. Nothing but the key
// is needed to check it:
//
//	v1.{expiry, Unix seconds}.{HMAC-SHA256 of version, sandbox, port and expiry}
func SignLink(key []byte, sandboxID string, port uint16, expires time.Time) string {
	expiry := strconv.FormatInt(expires.Unix(), 10)
	return linkVersion + "." + expiry + "." + base64.RawURLEncoding.EncodeToString(linkMAC(key, sandboxID, port, expiry))
}

func linkMAC(key []byte, sandboxID string, port uint16, expiry string) []byte {
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s:%s:%d:%s", linkVersion, sandboxID, port, expiry)
	return mac.Sum(nil)
}

// checkLinks returns until when the best of some links holds, or why none does.
// There may be several: anybody who shares the site can add cookies, but only
// somebody with a link can make one count.
func (a Access) checkLinks(d Destination, links []string, now time.Time) (expires time.Time, why string) {
	why = linkInvalid
	for _, link := range links {
		until, ok := a.verifyLink(d, link)
		switch {
		case !ok:
		case until.After(now):
			return until, ""
		default:
			why = linkExpired
		}
	}
	return time.Time{}, why
}

// verifyLink reports whether a link was signed for this destination, and until when.
func (a Access) verifyLink(d Destination, link string) (expires time.Time, ok bool) {
	version, rest, _ := strings.Cut(link, ".")
	expiry, signature, _ := strings.Cut(rest, ".")
	if len(a.LinkKey) == 0 || version != linkVersion {
		return time.Time{}, false
	}
	mac, err := base64.RawURLEncoding.Strict().DecodeString(signature)
	if err != nil || !hmac.Equal(mac, linkMAC(a.LinkKey, d.SandboxID, d.Port, expiry)) {
		return time.Time{}, false
	}
	seconds, err := strconv.ParseInt(expiry, 10, 64)
	return time.Unix(seconds, 0), err == nil
}

// takeLinks takes the preview links out of a target's query and returns them. The
// rest stays as it was, byte for byte.
func (t *requestTarget) takeLinks() (links []string) {
	if !strings.Contains(t.query, LinkParameter) && !strings.Contains(t.query, "%") {
		return nil // most requests
	}
	parts := strings.Split(t.query, "&")
	kept := parts[:0]
	for _, part := range parts {
		name, value, _ := strings.Cut(part, "=")
		if lenientUnescape(name) == LinkParameter {
			links = append(links, value)
		} else {
			kept = append(kept, part)
		}
	}
	if len(links) > 0 {
		t.query, t.hasQuery = strings.Join(kept, "&"), len(kept) > 0
	}
	return links
}

// location returns the reference that leads a client to t below prefix.
func (t requestTarget) location(prefix string) string {
	path := t.path
	if prefix == "" && len(path) > 1 && (path[1] == '/' || path[1] == '\\') {
		path = "/." + path // by itself this would name a host
	}
	if t.hasQuery {
		path += "?" + t.query
	}
	var b strings.Builder
	b.WriteString(prefix)
	for _, c := range []byte(path) {
		if c >= 0x80 || c == '#' {
			fmt.Fprintf(&b, "%%%02X", c) // the same to a server, and in a header the same to all clients
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

func linkCookieName(port uint16) string { return linkCookie + strconv.Itoa(int(port)) }

// linkCookies returns the links that a client has kept for a port.
func linkCookies(h http.Header, port uint16) (links []string) {
	name := linkCookieName(port)
	for _, line := range h["Cookie"] {
		for _, cookie := range strings.Split(line, ";") {
			key, value, _ := strings.Cut(strings.TrimSpace(cookie), "=")
			if key == name {
				links = append(links, value)
			}
		}
	}
	return links
}

// withoutLinkCookies returns the lines of a Cookie header without the links, of
// whatever port, and leaves other cookies as they are.
func withoutLinkCookies(lines []string) []string {
	if !slices.ContainsFunc(lines, func(line string) bool { return strings.Contains(line, linkCookie) }) {
		return lines
	}
	var kept []string
	for _, line := range lines {
		cookies := slices.DeleteFunc(strings.Split(line, ";"), func(cookie string) bool {
			return strings.HasPrefix(strings.TrimSpace(cookie), linkCookie)
		})
		if line = strings.TrimSpace(strings.Join(cookies, ";")); line != "" {
			kept = append(kept, line)
		}
	}
	return kept
}
