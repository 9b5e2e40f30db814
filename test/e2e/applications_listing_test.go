package e2e

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// A directory listing redirects from /dir to /dir/ and is full of relative links:
// it loops or leaves the sandbox where a proxy cleans paths or drops its prefix.
func TestDirectoryListingsAreNavigated(t *testing.T) {
	w := startWeb(t, suite.base.RootFS)
	b := w.create(nil)
	b.run("mkdir -p '/srv/a b/semi;colon/100%' && echo inside > '/srv/a b/semi;colon/100%/x;y?z#.txt'")
	w.serve(t, b, 8000, "", "exec python3 -m http.server 8000 --bind 127.0.0.1 -d /srv")
	forms := w.forms(b, 8000)
	for _, f := range forms {
		t.Run("client in the form "+f.name, func(t *testing.T) { followListing(t, w.client(t, true), f) })
	}
	t.Run("browser", func(t *testing.T) {
		w.browse(t, b, "listing.browser.mjs", map[string][]form{"listing": forms})
	})
}

func followListing(t *testing.T, client *http.Client, f form) {
	client.Timeout = 20 * time.Second
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
	root := strings.TrimSuffix(f.url, "/")
	const deep, file = "/a%20b/semi%3Bcolon/100%25/", "x%3By%3Fz%23.txt"
	for _, step := range []struct{ path, landed, has string }{
		{"/", "/", `<a href="a%20b/">`},
		{"/a%20b", "/a%20b/", `<a href="semi%3Bcolon/">`},
		{"/a%20b?q=1&r=/", "/a%20b/?q=1&r=/", `<a href="semi%3Bcolon/">`},
		{"/a%20b/semi;colon", "/a%20b/semi;colon/", `<a href="100%25/">`},
		{"/a%20b/semi%3Bcolon/100%25", deep, `<a href="` + file + `">`},
		{deep + file, deep + file, "inside\n"},
	} {
		landed, body, err := get(root + step.path)
		if err != nil || landed != root+step.landed || !strings.Contains(body, step.has) {
			t.Errorf("%s led to %s, %v; want %s with %s in\n%s", step.path, landed, err, step.landed, step.has, body)
		}
	}
	if landed, _, err := get(root); f.name == "path" && (err != nil || landed != f.url) {
		t.Errorf("the prefix without a slash led to %s, %v", landed, err)
	}
}
