package proxy_test

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"

	"github.com/wrenn/wrenn/internal/proxy"
)

const token = "0123456789abcdef"

var (
	linkKey   = []byte("key of sandbox A")
	protected = proxy.Access{Protected: true, Token: token, LinkKey: linkKey}
	public    = proxy.Access{Token: token, LinkKey: linkKey}
)

func linkTo(port uint16, d time.Duration) string {
	return proxy.SignLink(linkKey, idA, port, time.Now().Add(d))
}

// tell is an application that shows what reached it.
func tell(rw http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(rw, "%s token=%q cookie=%q", r.RequestURI, r.Header["E2b-Traffic-Access-Token"], r.Header["Cookie"])
}

func TestAProtectedPortWantsTheTrafficToken(t *testing.T) {
	w := newWorld(t)
	port := guest(t, tell)
	const in = `/a?b token=[] cookie=[]`
	for _, tc := range []struct {
		name   string
		access proxy.Access
		tokens []string
		says   string // of a refusal
	}{
		{"no token", protected, nil, "This port is protected"},
		{"the token", protected, []string{token}, ""},
		{"a wrong token", protected, []string{token + "0"}, "The traffic access token is wrong"},
		{"its beginning", protected, []string{token[:8]}, "The traffic access token is wrong"},
		{"an empty token", protected, []string{""}, "The traffic access token is wrong"},
		{"the token among others", protected, []string{"x", token}, "The traffic access token is wrong"},
		{"an empty token where there is none", proxy.Access{Protected: true}, []string{""}, "The traffic access token is wrong"},
		{"no token on a public port", public, nil, ""},
		{"the token on a public port", public, []string{token}, ""},
		{"a wrong token on a public port", public, []string{"x"}, ""},
	} {
		w.rule(idA, tc.access)
		for version, client := range w.clients() {
			req := w.request(t, "GET", idA, port, "/a?b", nil)
			if tc.tokens != nil {
				req.Header[proxy.HeaderTrafficToken] = tc.tokens
			}
			res, body := do(t, client, req)
			if tc.says == "" {
				if res.StatusCode != 200 || body != in {
					t.Errorf("%s, %s: %s %s, want %s", tc.name, version, res.Status, body, in)
				}
				continue
			}
			var f struct {
				SandboxID, Message string
				Port, Code         int
			}
			if err := json.Unmarshal([]byte(body), &f); err != nil {
				t.Fatalf("%s, %s: %s %s", tc.name, version, res.Status, body)
			}
			if res.StatusCode != 403 || f.Code != 403 || f.SandboxID != idA || f.Port != int(port) || !strings.HasPrefix(f.Message, tc.says) {
				t.Errorf("%s, %s: %s %s", tc.name, version, res.Status, body)
			}
		}
	}
}

func TestAPersonIsToldOnAPageThatAPortIsProtected(t *testing.T) {
	w := newWorld(t)
	w.rule(idA, protected)
	port := guest(t, tell)
	res, body := do(t, w.http1, asBrowser(w.request(t, "GET", idA, port, "/", nil)))
	if res.StatusCode != 403 || !strings.Contains(body, "This port is protected") || !strings.Contains(body, idA) || strings.Contains(body, "Start a server") {
		t.Errorf("%s %s", res.Status, body)
	}
}

func TestTheGuestAgentsPortAsksForNoTrafficToken(t *testing.T) {
	w := newWorld(t)
	w.rule(idB, proxy.Access{Protected: true, Token: token, MaskRequestHost: "masked.test"})
	guestAt(t, "127.0.0.2:49983", func(rw http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(rw, "%s %s token=%q", r.Host, r.Header.Get("X-Access-Token"), r.Header["E2b-Traffic-Access-Token"])
	})
	for _, tokens := range [][]string{nil, {token}, {"wrong"}} {
		req := w.request(t, "GET", idB, proxy.AgentPort, "/files", nil)
		req.Header.Set("X-Access-Token", "its own")
		req.Header[proxy.HeaderTrafficToken] = tokens
		if res, body := do(t, w.http1, req); body != req.Host+` its own token=[]` {
			t.Errorf("with %q: %s %s", tokens, res.Status, body)
		}
	}
}

// asBrowser makes a request one that a person's browser makes to open a page.
func asBrowser(req *http.Request) *http.Request {
	req.Header.Set("User-Agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0")
	req.Header.Set("Accept", "text/html,application/xhtml+xml,*/*;q=0.8")
	return req
}

func TestAPreviewLinkLetsItsBearerIn(t *testing.T) {
	w := newWorld(t)
	port := guest(t, tell)
	good := linkTo(port, time.Hour)
	version, rest, _ := strings.Cut(good, ".")
	expiry, mac, _ := strings.Cut(rest, ".")
	later := fmt.Sprint(time.Now().Add(24 * time.Hour).Unix())
	const expired, invalid = "The preview link has expired", "The preview link is not valid for this address"
	for _, tc := range []struct{ name, query, arrives, says string }{
		{"a good one", "wrenn_preview=" + good, "/x", ""},
		{"before other parameters", "wrenn_preview=" + good + "&a=%2f&&b", "/x?a=%2f&&b", ""},
		{"after other parameters", "a=1+2&wrenn_preview=" + good, "/x?a=1+2", ""},
		{"after an empty one", "&wrenn_preview=" + good, "/x?", ""},
		{"with its name escaped", "wrenn%5fpreview=" + good, "/x", ""},
		{"an expired one", "wrenn_preview=" + linkTo(port, -2*time.Second), "", expired},
		{"one of another port", "wrenn_preview=" + linkTo(port+1, time.Hour), "", invalid},
		{"one of another sandbox", "wrenn_preview=" + proxy.SignLink(linkKey, idB, port, time.Now().Add(time.Hour)), "", invalid},
		{"one by another key", "wrenn_preview=" + proxy.SignLink([]byte("x"), idA, port, time.Now().Add(time.Hour)), "", invalid},
		{"an expired one by another key", "wrenn_preview=" + proxy.SignLink([]byte("x"), idA, port, time.Unix(1, 0)), "", invalid},
		{"one made to last longer", "wrenn_preview=" + version + "." + later + "." + mac, "", invalid},
		{"one with another version", "wrenn_preview=v2." + expiry + "." + mac, "", invalid},
		{"one cut short", "wrenn_preview=" + good[:len(good)-1], "", invalid},
		{"one with more behind it", "wrenn_preview=" + good + "A", "", invalid},
		{"one without a signature", "wrenn_preview=" + version + "." + expiry + ".", "", invalid},
		{"an empty one", "wrenn_preview=", "", invalid},
		{"a name alone", "wrenn_preview", "", invalid},
		{"two", "wrenn_preview=" + good + "&wrenn_preview=" + good, "", invalid},
	} {
		for form, access := range map[string]proxy.Access{"protected": protected, "public": public} {
			w.rule(idA, access)
			for version, client := range w.clients() {
				req := w.request(t, "GET", idA, port, "/x", nil)
				req.URL.RawQuery = tc.query
				res, body := do(t, client, req)
				switch {
				case tc.says != "" && (res.StatusCode != 403 || !strings.Contains(body, tc.says)):
					t.Errorf("%s, %s, %s: %s %s, want %q", tc.name, form, version, res.Status, body, tc.says)
				case tc.says == "" && body != tc.arrives+" token=[] cookie=[]":
					t.Errorf("%s, %s, %s: %s %s, want %s", tc.name, form, version, res.Status, body, tc.arrives)
				}
			}
		}
	}
	t.Run("none is valid without a key", func(t *testing.T) {
		w.rule(idA, proxy.Access{Protected: true, Token: token})
		req := w.request(t, "GET", idA, port, "/?wrenn_preview="+proxy.SignLink(nil, idA, port, time.Now().Add(time.Hour)), nil)
		if res, body := do(t, w.http1, req); res.StatusCode != 403 {
			t.Errorf("%s %s", res.Status, body)
		}
	})
}

func TestAPreviewLinkBecomesACookieInABrowser(t *testing.T) {
	w := newWorld(t)
	w.rule(idA, protected)
	port := guest(t, tell)
	link := linkTo(port, time.Hour)
	prefix := fmt.Sprintf("/proxy/%s/%d", idA, port)
	for form, at := range map[string]string{"by host": "", "by path": prefix} {
		for version, client := range w.clients() {
			client := *client
			client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
			req := asBrowser(w.request(t, "GET", idA, port, at+"/a%2Fb?x=%20&wrenn_preview="+link+"&y", nil))
			if at != "" {
				req.Host = w.addr
			}
			res, body := do(t, &client, req)
			if res.StatusCode != 302 || res.Header.Get("Location") != at+"/a%2Fb?x=%20&y" || body != "" {
				t.Errorf("%s, %s: %s to %q: %q", form, version, res.Status, res.Header.Get("Location"), body)
			}
			for name, want := range map[string]string{"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"} {
				if got := res.Header.Get(name); got != want {
					t.Errorf("%s, %s: %s is %q", form, version, name, got)
				}
			}
			cookies := res.Cookies()
			if len(cookies) != 1 {
				t.Fatalf("%s, %s: got cookies %v", form, version, cookies)
			}
			c := cookies[0]
			if c.MaxAge < 3590 || c.MaxAge > 3600 {
				t.Errorf("%s, %s: the cookie lasts %d s", form, version, c.MaxAge)
			}
			want := http.Cookie{Name: fmt.Sprintf("wrenn_preview_%d", port), Value: link, Path: at + "/", HttpOnly: true, SameSite: http.SameSiteLaxMode}
			c.MaxAge, c.Raw = 0, ""
			if diff := cmp.Diff(want, *c); diff != "" {
				t.Errorf("%s, %s: cookie (-want +got):\n%s", form, version, diff)
			}
		}
	}
}

func TestThePreviewCookieStaysOnTLS(t *testing.T) {
	f := newFront(t)
	f.rule(idA, protected)
	port := guest(t, tell)
	for scheme, addr := range map[string]string{"http": f.plain, "https": f.tls} {
		transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
		defer transport.CloseIdleConnections()
		req, err := http.NewRequestWithContext(t.Context(), "GET", fmt.Sprintf("%s://%s/proxy/%s/%d/?wrenn_preview=%s", scheme, addr, idA, port, linkTo(port, time.Hour)), nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := transport.RoundTrip(asBrowser(req))
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if c := res.Cookies(); len(c) != 1 || c[0].Secure != (scheme == "https") {
			t.Errorf("%s: %s with cookies %v", scheme, res.Status, c)
		}
	}
}

func TestWhatAPageLoadsIsLetInByItsCookie(t *testing.T) {
	w := newWorld(t)
	w.rule(idA, protected)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			websocketEcho(rw, r)
			return
		}
		http.SetCookie(rw, &http.Cookie{Name: "app", Value: "1", Path: "/"})
		tell(rw, r)
	})
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	browser := *w.http1
	browser.Jar = jar
	page := fmt.Sprintf("%s/proxy/%s/%d/", w.url, idA, port)
	open := func(method, target string) (*http.Response, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, target, nil)
		if err != nil {
			t.Fatal(err)
		}
		return do(t, &browser, asBrowser(req))
	}
	if res, _ := open("GET", page); res.StatusCode != 403 {
		t.Fatalf("without a link: %s", res.Status)
	}
	if res, body := open("GET", page+"?wrenn_preview="+linkTo(port, time.Hour)); body != `/ token=[] cookie=[]` || res.Request.URL.RawQuery != "" {
		t.Fatalf("%s %s at %s", res.Status, body, res.Request.URL)
	}
	if res, body := open("POST", page+"style.css"); body != `/style.css token=[] cookie=["app=1"]` {
		t.Errorf("%s %s", res.Status, body)
	}
	conn, _, err := websocket.Dial(t.Context(), page+"ws", &websocket.DialOptions{HTTPClient: &browser})
	if err != nil {
		t.Fatalf("WebSocket: %v", err)
	}
	conn.CloseNow()
	// The other port is another address, and the cookie is not for it.
	other := guest(t, tell)
	if res, _ := open("GET", fmt.Sprintf("%s/proxy/%s/%d/", w.url, idA, other)); res.StatusCode != 403 {
		t.Errorf("the cookie let in to another port: %s", res.Status)
	}
}

func TestCookiesOfOthersNeitherLetInNorStandInTheWay(t *testing.T) {
	w := newWorld(t)
	w.rule(idA, protected)
	w.rule(idB, proxy.Access{Protected: true, Token: token, LinkKey: []byte("key of sandbox B")})
	port := guest(t, tell)
	name := fmt.Sprintf("wrenn_preview_%d=", port)
	good, old := linkTo(port, time.Hour), linkTo(port, -time.Hour)
	foreign := proxy.SignLink([]byte("key of sandbox B"), idB, port, time.Now().Add(time.Hour))
	for _, tc := range []struct {
		name    string
		cookies []string
		arrives string // the cookies that do; or what a refusal says
	}{
		{"one", []string{name + good}, "[]"},
		{"one among others", []string{"a=b; " + name + good + "; c=d;e"}, `["a=b; c=d;e"]`},
		{"one after planted ones", []string{name + foreign + "; " + name + "x; " + name + old + ";" + name + good}, "[]"},
		{"several lines", []string{"a=b", name + good, "c=d"}, `["a=b" "c=d"]`},
		{"one and those of other ports", []string{name + good + "; wrenn_preview_1=x; wrenn_preview_=y; wrenn_previewed=z"}, `["wrenn_previewed=z"]`},
		{"another sandbox's", []string{name + foreign}, "not valid"},
		{"an old one", []string{name + old}, "has expired"},
		{"another port's", []string{fmt.Sprintf("wrenn_preview_%d=%s", port+1, good)}, "is protected"},
		{"none", []string{"a=b"}, "is protected"},
	} {
		req := w.request(t, "GET", idA, port, "/", nil)
		req.Header["Cookie"] = tc.cookies
		res, body := do(t, w.http1, req)
		switch {
		case strings.HasPrefix(tc.arrives, "["):
			if body != "/ token=[] cookie="+tc.arrives {
				t.Errorf("%s: %s %s, want %s", tc.name, res.Status, body, tc.arrives)
			}
		case res.StatusCode != 403 || !strings.Contains(body, tc.arrives):
			t.Errorf("%s: %s %s, want %q", tc.name, res.Status, body, tc.arrives)
		}
	}
}

func TestOnlyWhoGoesToAnAddressIsRedirected(t *testing.T) {
	w := newWorld(t)
	w.rule(idA, protected)
	port := guest(t, tell)
	link := linkTo(port, time.Hour)
	for name, tc := range map[string]struct {
		method     string
		header     map[string]string
		redirected bool
	}{
		"a page":                {"GET", map[string]string{"Sec-Fetch-Mode": "navigate"}, true},
		"a page, head only":     {"HEAD", map[string]string{"Sec-Fetch-Mode": "navigate"}, true},
		"a form":                {"POST", map[string]string{"Sec-Fetch-Mode": "navigate"}, false},
		"a script's fetch":      {"GET", map[string]string{"Sec-Fetch-Mode": "cors", "Accept": "*/*"}, false},
		"an image":              {"GET", map[string]string{"Sec-Fetch-Mode": "no-cors"}, false},
		"a fetch, not trusted":  {"GET", map[string]string{"Accept": "*/*"}, false},
		"curl":                  {"GET", map[string]string{"User-Agent": "curl/8.5.0", "Accept": "*/*"}, false},
		"a program for HTML":    {"GET", map[string]string{"User-Agent": "python-requests/2", "Accept": "text/html"}, false},
		"a fetch of JSON":       {"GET", map[string]string{"Accept": "application/json"}, false},
		"an XMLHttpRequest":     {"GET", map[string]string{"X-Requested-With": "XMLHttpRequest"}, false},
		"a page, not trusted":   {"GET", nil, true},
		"a page, with a token":  {"GET", map[string]string{proxy.HeaderTrafficToken: token}, false},
		"a page, wrong token":   {"GET", map[string]string{proxy.HeaderTrafficToken: "x"}, true},
		"a WebSocket handshake": {"GET", map[string]string{"Sec-Fetch-Mode": "websocket"}, false},
	} {
		client := *w.http1
		client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		req := asBrowser(w.request(t, tc.method, idA, port, "/?wrenn_preview="+link, nil))
		for k, v := range tc.header {
			req.Header.Set(k, v)
		}
		res, body := do(t, &client, req)
		if want := map[bool]int{true: 302, false: 200}[tc.redirected]; res.StatusCode != want {
			t.Errorf("%s: %s %s, want %d", name, res.Status, body, want)
		}
	}
}

func TestARedirectStaysWithTheSandbox(t *testing.T) {
	w := newWorld(t)
	w.rule(idA, protected)
	port := guest(t, tell)
	link := "wrenn_preview=" + linkTo(port, time.Hour)
	host := fmt.Sprintf("%d-%s.wrenn.test", port, idA)
	for target, want := range map[string]string{
		"/?" + link:                              "/",
		"/a/../b?" + link:                        "/a/../b",
		"//evil.test/a?" + link:                  "/.//evil.test/a",
		`/\evil.test/?` + link:                   `/./\evil.test/`,
		"/\xc3\xbc?q=\xff&" + link:               "/%C3%BC?q=%FF",
		"/?a#b&" + link:                          "/?a%23b",
		"/?next=https://evil.test/&" + link:      "/?next=https://evil.test/",
		"http://" + host + "/c?" + link:          "/c",
		"http://" + host + "?" + link:            "/",
		"/proxy/" + idB + "/1/?" + link:          "/proxy/" + idB + "/1/",
		"/?" + link + "&" + "x=wrenn_preview":    "/?x=wrenn_preview",
		"/?" + strings.ToUpper("a") + "&" + link: "/?A",
	} {
		res, body, err := w.raw(t, "GET "+target+" HTTP/1.1\r\nHost: "+host+
			"\r\nUser-Agent: Mozilla/5.0\r\nAccept: text/html\r\nConnection: close\r\n\r\n")
		if err != nil {
			t.Fatal(err)
		}
		got := res.Header.Get("Location")
		if res.StatusCode != 302 || got != want {
			t.Errorf("%q: %s to %q %s, want %q", target, res.Status, got, body, want)
		}
		base := &url.URL{Scheme: "https", Host: host, Path: "/"}
		if u, err := base.Parse(got); err != nil || u.Host != host {
			t.Errorf("%q: %q leads to %v, %v", target, got, u, err)
		}
	}
}

func TestPreflightsNeverReachAProtectedApplication(t *testing.T) {
	w := newWorld(t)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "application") })
	preflight := func(ask map[string]string) (*http.Response, string) {
		req := w.request(t, "OPTIONS", idA, port, "/", nil)
		for k, v := range ask {
			req.Header.Set(k, v)
		}
		return do(t, w.http1, req)
	}
	ask := map[string]string{
		"Origin": "https://app.test", "Access-Control-Request-Method": "PUT",
		"Access-Control-Request-Headers": "content-type, e2b-traffic-access-token",
	}
	if _, body := preflight(ask); body != "application" {
		t.Errorf("on a public port the application answers; got %q", body)
	}
	w.rule(idA, protected)
	res, body := preflight(ask)
	if res.StatusCode != 204 || body != "" {
		t.Errorf("%s %q", res.Status, body)
	}
	for name, want := range map[string]string{
		"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Methods": "PUT", "Access-Control-Allow-Credentials": "",
		"Access-Control-Allow-Headers": "content-type, e2b-traffic-access-token",
	} {
		if got := res.Header.Get(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	for _, missing := range []string{"Origin", "Access-Control-Request-Method", "Access-Control-Request-Headers"} {
		without := map[string]string{}
		for k, v := range ask {
			if k != missing {
				without[k] = v
			}
		}
		if res, body := preflight(without); res.StatusCode != 403 {
			t.Errorf("without %s: %s %s", missing, res.Status, body)
		}
	}
}

func TestAMaskedApplicationSeesItsOwnName(t *testing.T) {
	w := newWorld(t)
	w.rule(idA, proxy.Access{MaskRequestHost: "app.test:${PORT}"})
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/login" {
			http.Redirect(rw, r, "http://"+r.Host+"/home", http.StatusFound)
			return
		}
		fmt.Fprintf(rw, "%s for %s, origin %s", r.Host, r.Header["X-Forwarded-Host"], r.Header["Origin"])
	})
	masked := fmt.Sprintf("app.test:%d", port)
	prefix := fmt.Sprintf("/proxy/%s/%d", idA, port)
	for form, at := range map[string]string{"by host": "", "by path": prefix} {
		for version, client := range w.clients() {
			client := *client
			client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
			send := func(path, origin string) (*http.Response, string, string) {
				req := w.request(t, "GET", idA, port, at+path, nil)
				if at != "" {
					req.Host = "localhost:7080"
				}
				req.Header.Set("Origin", strings.ReplaceAll(origin, "SELF", req.Host))
				req.Header.Set("X-Forwarded-Host", "spoofed")
				res, body := do(t, &client, req)
				return res, body, req.Host
			}
			for origin, want := range map[string]string{
				"https://SELF": "https://" + masked, "http://SELF": "http://" + masked, "https://evil.test": "https://evil.test",
				"null": "null", "https://SELF.evil.test": "https://SELF.evil.test", "app://SELF": "app://SELF",
			} {
				_, body, host := send("/", origin)
				if want := fmt.Sprintf("%s for [%s], origin [%s]", masked, host, strings.ReplaceAll(want, "SELF", host)); body != want {
					t.Errorf("%s, %s: the application saw %q, want %q", form, version, body, want)
				}
			}
			if res, _, _ := send("/login", "https://SELF"); res.Header.Get("Location") != at+"/home" {
				t.Errorf("%s, %s: sent to %q", form, version, res.Header.Get("Location"))
			}
		}
	}
}
