package e2b

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
)

const defaultPreview = 3600 // seconds

// previewLink makes a URL at which anybody reaches a port of the sandbox for a while.
func (a *api) previewLink(c *call) error {
	id, err := c.sandboxID()
	if err != nil {
		return err
	}
	var body struct {
		Port      *int64 `json:"port"`
		ExpiresIn *int64 `json:"expiresIn"`
	}
	if err := decodeRequired(c.r, &body); err != nil {
		return err
	}
	if body.Port == nil {
		return invalid("port is missing")
	}
	if body.ExpiresIn == nil {
		body.ExpiresIn = new(int64)
		*body.ExpiresIn = defaultPreview
	}
	link, expires, err := a.plane.PreviewLink(c.r.Context(), c.team.ID, id, int(*body.Port), seconds(*body.ExpiresIn))
	if err != nil {
		return err
	}
	to := a.portURL(c.r, id, strconv.FormatInt(*body.Port, 10))
	to.RawQuery = proxy.LinkParameter + "=" + link
	return writeJSON(c.w, http.StatusCreated, struct {
		URL       string    `json:"url"`
		ExpiresAt time.Time `json:"expiresAt"`
	}{to.String(), timestamp(expires)})
}

// portURL returns where a port is for whoever has reached the API as r did: by name
// if the domain is served for others or r came by it, else by path, at the address
// that r came to.
func (a *api) portURL(r *http.Request, id sandbox.ID, port string) *url.URL {
	u := &url.URL{Scheme: "http", Host: r.Host, Path: "/"}
	if r.TLS != nil {
		u.Scheme = "https"
	}
	domain := strings.TrimPrefix(strings.ToLower(r.Host), "api.")
	switch {
	case a.tls:
		u.Scheme, domain = "https", a.domain
	case a.domain == "" || hostName(domain) != hostName(a.domain):
		u.Path = "/proxy/" + string(id) + "/" + port + "/"
		return u
	}
	u.Host = port + "-" + string(id) + "." + domain
	return u
}

// hostName returns a host without its port.
func hostName(hostport string) string {
	return (&url.URL{Host: hostport}).Hostname()
}
