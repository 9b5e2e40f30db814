package e2e

import (
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"strings"
	"testing"
	"time"
)

// A directory listing redirects from /dir to /dir/ and is full of relative links:
// it loops or leaves the sandbox where a proxy cleans paths or drops its prefix.
func TestDirectoryListingsAreNavigatedThroughThePathForm(t *testing.T) {
	p := startPlatform(t)
	b := p.create(nil)
	b.run("mkdir -p '/srv/a b/deep' && echo inside > '/srv/a b/deep/x;y?z.txt'")
	b.background("exec python3 -m http.server 8000 --bind 127.0.0.1 -d /srv", false)
	prefix := fmt.Sprintf("%s/proxy/%s/8000", p.url, b.id)
	jar, _ := cookiejar.New(nil)
	client := &http.Client{Jar: jar, Timeout: 10 * time.Second}
	defer client.CloseIdleConnections()
	get := func(url string) (landed, body string, err error) {
		res, err := client.Get(url)
		if err != nil {
			return "", "", err
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err == nil && res.StatusCode != http.StatusOK {
			err = fmt.Errorf("GET %s: %s: %.200s", url, res.Status, text)
		}
		return res.Request.URL.String(), string(text), err
	}
	eventually(t, 20*time.Second, "the server is up", func() error {
		_, _, err := get(prefix)
		return err
	})
	for _, step := range []struct{ url, landed, has string }{
		{prefix, prefix + "/", `<a href="a%20b/">`},
		{prefix + "/a%20b", prefix + "/a%20b/", `<a href="deep/">`},
		{prefix + "/a%20b/deep", prefix + "/a%20b/deep/", `<a href="x%3By%3Fz.txt">`},
		{prefix + "/a%20b/deep/x%3By%3Fz.txt", prefix + "/a%20b/deep/x%3By%3Fz.txt", "inside\n"},
	} {
		landed, body, err := get(step.url)
		if err != nil || landed != step.landed || !strings.Contains(body, step.has) {
			t.Errorf("%s led to %s, %v; want %s with %s in\n%s", step.url, landed, err, step.landed, step.has, body)
		}
	}
}
