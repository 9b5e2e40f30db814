package proxy

import (
	"crypto/subtle"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// HeaderTrafficToken carries the traffic token of a sandbox whose ports are
// protected.
const HeaderTrafficToken = "E2b-Traffic-Access-Token"

// Access says who may reach the ports of a sandbox, and by which name the
// applications know themselves. The zero value: everybody, by the client's.
type Access struct {
	// Protected ports want the traffic token or a preview link. The guest
	// agent's port is not among them: it has a token of its own.
	Protected bool
	// Token is the traffic token. An empty one lets nobody in.
	Token string
	// LinkKey signs the preview links of this sandbox; see SignLink. Without a
	// key no link is valid.
	LinkKey []byte
	// AgentToken is what the guest agent wants; empty: nothing. Who does not know it
	// does not wake a sandbox by calling the guest agent.
	AgentToken string
	// MaskRequestHost, unless empty, is the Host that applications see, with
	// sandbox.MaskPort in place of the port's number.
	MaskRequestHost string
}

// maskedHost returns the Host that the application on a port sees; empty: the client's.
func (a Access) maskedHost(port uint16) string {
	if port == AgentPort {
		return ""
	}
	return strings.ReplaceAll(a.MaskRequestHost, sandbox.MaskPort, strconv.Itoa(int(port)))
}

// admit decides whether a request goes on to the sandbox, and answers it if not.
// What the request says to the proxy alone is taken out of the target here, and
// out of the header by forApplication.
func (s *stream) admit(r *http.Request, a Access) bool {
	if s.trusted {
		return true // a front has decided
	}
	if s.mask = a.maskedHost(s.dest.Port); s.mask != "" {
		s.host = s.mask
	}
	links := s.target.takeLinks()
	if s.dest.Port == AgentPort {
		return true
	}
	token, hasToken := trafficToken(r.Header)
	switch {
	case hasToken && a.Token != "" && subtle.ConstantTimeCompare([]byte(token), []byte(a.Token)) == 1:
		return true
	case len(links) > 0:
		return s.admitLink(r, a, links)
	case !a.Protected:
		return true
	}
	cookies := linkCookies(r.Header, s.dest.Port)
	_, why := a.checkLinks(s.dest, cookies, time.Now())
	switch {
	case why == "":
		return true
	case announces(r, HeaderTrafficToken):
		s.allowPreflight(r.Header)
		return false
	case hasToken:
		why = "The traffic access token is wrong"
	case len(cookies) == 0:
		why = "This port is protected: send the sandbox's traffic access token in the header " +
			strings.ToLower(HeaderTrafficToken) + ", or open a preview link"
	}
	s.forbid(r, why)
	return false
}

// admitLink judges a request by the link in its URL. A person's browser is sent to
// the same place without it: so what the page loads is let in as well, by a
// cookie, and the link is in no Referer. A link that is no good is said to be so
// on public ports too, where leaving it out would have been enough.
func (s *stream) admitLink(r *http.Request, a Access, links []string) bool {
	expires, why := a.checkLinks(s.dest, links, time.Now())
	switch {
	case len(links) > 1:
		why = linkInvalid
	case why != "":
	case (r.Method == http.MethodGet || r.Method == http.MethodHead) && navigates(r):
		s.redirectWithCookie(r, links[0], expires)
		return false
	default:
		return true
	}
	s.forbid(r, why)
	return false
}

func (s *stream) forbid(r *http.Request, why string) {
	s.fail(r, failure{SandboxID: s.dest.SandboxID, Message: why, Port: s.dest.Port, Code: http.StatusForbidden})
}

// redirectWithCookie answers with the address that the client asked for, without
// the link.
func (s *stream) redirectWithCookie(r *http.Request, link string, expires time.Time) {
	http.SetCookie(s, &http.Cookie{
		Name: linkCookieName(s.dest.Port), Value: link,
		Path:   s.dest.Prefix + "/", // no Domain: for this host alone
		MaxAge: max(1, int(time.Until(expires)/time.Second)),
		Secure: r.TLS != nil, HttpOnly: true, SameSite: http.SameSiteLaxMode,
	})
	h := s.Header()
	h.Set("Location", s.target.location(s.dest.Prefix))
	h.Set("Cache-Control", "no-store")
	h.Set("Referrer-Policy", "no-referrer")
	s.WriteHeader(http.StatusFound)
}

func trafficToken(h http.Header) (string, bool) {
	values := h[HeaderTrafficToken]
	if len(values) != 1 {
		return "", len(values) > 0
	}
	return values[0], true
}

// navigates reports whether a person goes to an address, as opposed to a page or a
// program that fetches it. Browsers say so only to origins that they trust, TLS
// and the loopback; else what they accept tells.
func navigates(r *http.Request) bool {
	return wantsPage(r) &&
		(r.Header.Get("Sec-Fetch-Mode") != "" || strings.Contains(strings.ToLower(r.Header.Get("Accept")), "text/html"))
}

// announces reports whether a browser asks if a page of another origin may send a
// request that carries a token in this header. It asks without the token.
func announces(r *http.Request, header string) bool {
	if r.Method != http.MethodOptions || r.Header.Get("Origin") == "" || r.Header.Get("Access-Control-Request-Method") == "" {
		return false
	}
	for _, name := range strings.Split(r.Header.Get("Access-Control-Request-Headers"), ",") {
		if strings.EqualFold(strings.TrimSpace(name), header) {
			return true
		}
	}
	return false
}

// allowPreflight says yes to such a question in place of the application, which
// must not hear from somebody who has shown no token: many answer to OPTIONS as to
// all else. It gives nothing away: the request that follows is without cookies, as
// the wildcard demands, and is judged by its token.
func (s *stream) allowPreflight(asked http.Header) {
	h := s.Header()
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Access-Control-Allow-Methods", asked.Get("Access-Control-Request-Method"))
	h.Set("Access-Control-Allow-Headers", asked.Get("Access-Control-Request-Headers"))
	h.Set("Access-Control-Max-Age", "600")
	h.Set("Cache-Control", "no-store")
	s.WriteHeader(http.StatusNoContent)
}
