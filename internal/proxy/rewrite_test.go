package proxy

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"testing"
)

const rewriteID = "aaaaaaaaaaaaaaaaaaaa"

var (
	byHost = origin{
		dest: Destination{SandboxID: rewriteID, Port: 3000},
		addr: netip.MustParseAddrPort("10.11.0.7:3000"), host: "3000-" + rewriteID + ".wrenn.test:8443",
	}
	byPath = origin{
		dest: Destination{SandboxID: rewriteID, Port: 3000, Prefix: "/proxy/" + rewriteID + "/3000"},
		addr: byHost.addr, host: "localhost:7080",
	}
)

func TestReferencesOfApplications(t *testing.T) {
	const prefix = "/proxy/" + rewriteID + "/3000"
	for _, tc := range []struct{ ref, byHost, byPath string }{
		{"/next?a=b#c", "/next?a=b#c", prefix + "/next?a=b#c"},
		{"/", "/", prefix + "/"},
		{"/a//b/%2F;x/", "/a//b/%2F;x/", prefix + "/a//b/%2F;x/"},
		{"next/", "next/", "next/"},
		{"?a=/b", "?a=/b", "?a=/b"},
		{"", "", ""},
		{"#top", "#top", "#top"},
		{"next?to=http://10.11.0.7:3000/", "next?to=http://10.11.0.7:3000/", "next?to=http://10.11.0.7:3000/"},
		// By an address of the inside.
		{"http://10.11.0.7:3000/next", "/next", prefix + "/next"},
		{"http://10.11.0.7:3000", "/", prefix + "/"},
		{"http://10.11.0.7:3000?a=b", "/?a=b", prefix + "/?a=b"},
		{"//10.11.0.7:3000/next", "/next", prefix + "/next"},
		{"HTTP://LOCALHOST:3000/next", "/next", prefix + "/next"},
		{"http://me@localhost:3000/next", "/next", prefix + "/next"},
		{"http://127.0.0.1:3000/next/", "/next/", prefix + "/next/"},
		{"http://[::1]:3000/next", "/next", prefix + "/next"},
		{"http://0.0.0.0:3000/next", "/next", prefix + "/next"},
		{"http://169.254.0.21:3000/next", "/next", prefix + "/next"},
		{"http://localhost:3000//evil.test/", "/.//evil.test/", prefix + "//evil.test/"},
		// Another port of the same sandbox.
		{"http://localhost:8888/tree", "//8888-" + rewriteID + ".wrenn.test:8443/tree", "/proxy/" + rewriteID + "/8888/tree"},
		{"http://127.0.0.1/", "//80-" + rewriteID + ".wrenn.test:8443/", "/proxy/" + rewriteID + "/80/"},
		{"https://127.0.0.1/", "//443-" + rewriteID + ".wrenn.test:8443/", "/proxy/" + rewriteID + "/443/"},
		// By the name that the client used.
		{"https://3000-" + rewriteID + ".wrenn.test:8443/next", "https://3000-" + rewriteID + ".wrenn.test:8443/next", "https://3000-" + rewriteID + ".wrenn.test:8443/next"},
		// Told of its prefix.
		{prefix + "/next", prefix + "/next", prefix + "/next"},
		{prefix, prefix, prefix},
		{prefix + "0/next", prefix + "0/next", prefix + prefix + "0/next"},
		// Away from the sandbox.
		{"https://example.test/next", "https://example.test/next", "https://example.test/next"},
		{"https://10.11.0.8:3000/next", "https://10.11.0.8:3000/next", "https://10.11.0.8:3000/next"},
		{"//example.test/next", "//example.test/next", "//example.test/next"},
		{"mailto:a@localhost", "mailto:a@localhost", "mailto:a@localhost"},
		{"app://localhost:3000/x", "app://localhost:3000/x", "app://localhost:3000/x"},
		{"http://localhost:99999/x", "http://localhost:99999/x", "http://localhost:99999/x"},
	} {
		if got := byHost.rewriteURL(tc.ref); got != tc.byHost {
			t.Errorf("host form: %q became %q, want %q", tc.ref, got, tc.byHost)
		}
		if got := byPath.rewriteURL(tc.ref); got != tc.byPath {
			t.Errorf("path form: %q became %q, want %q", tc.ref, got, tc.byPath)
		}
	}
	own := "http://localhost:7080/next" // what applications make of the Host header
	if got := byPath.rewriteURL(own); got != prefix+"/next" {
		t.Errorf("path form: %q became %q", own, got)
	}
}

func TestRefreshesOfApplications(t *testing.T) {
	for value, want := range map[string]string{
		"5":                                 "5",
		"0; url=/next":                      "0; url=" + byPath.dest.Prefix + "/next",
		"0;URL='http://localhost:3000/a'":   "0;URL='" + byPath.dest.Prefix + "/a'",
		`1; url="/a"`:                       `1; url="` + byPath.dest.Prefix + `/a"`,
		"1; url=https://example.test/?url=": "1; url=https://example.test/?url=",
	} {
		if got := byPath.rewriteRefresh(value); got != want {
			t.Errorf("%q became %q, want %q", value, got, want)
		}
	}
}

func TestCookiesOfApplications(t *testing.T) {
	const prefix = "/proxy/" + rewriteID + "/3000"
	for _, tc := range []struct{ cookie, byHost, byPath string }{
		{"a=b", "a=b", "a=b"},
		{"a=b; Path=/; HttpOnly", "a=b; Path=/; HttpOnly", "a=b; Path=" + prefix + "/; HttpOnly"},
		{"a=b; path=/x; SameSite=Lax", "a=b; path=/x; SameSite=Lax", "a=b; Path=" + prefix + "/x; SameSite=Lax"},
		{"a=b; Path=", "a=b; Path=", "a=b; Path=" + prefix + "/"},
		{"a=b; Path=" + prefix + "/x", "a=b; Path=" + prefix + "/x", "a=b; Path=" + prefix + "/x"},
		{"a=b; Domain=localhost; Secure", "a=b; Secure", "a=b; Secure"},
		{"a=b; Domain=127.0.0.1", "a=b", "a=b"},
		{"a=b; domain=.wrenn.test", "a=b", "a=b"},
		{"a=b; Domain=.3000-" + rewriteID + ".wrenn.test", "a=b; Domain=.3000-" + rewriteID + ".wrenn.test", "a=b"},
		{"__Host-a=b; Path=/; Secure", "__Host-a=b; Path=/; Secure", "__Host-a=b; Path=/; Secure"},
		{"a=Path=/; Max-Age=3", "a=Path=/; Max-Age=3", "a=Path=/; Max-Age=3"},
	} {
		if got := byHost.rewriteCookie(tc.cookie); got != tc.byHost {
			t.Errorf("host form: %q became %q, want %q", tc.cookie, got, tc.byHost)
		}
		if got := byPath.rewriteCookie(tc.cookie); got != tc.byPath {
			t.Errorf("path form: %q became %q, want %q", tc.cookie, got, tc.byPath)
		}
	}
}

// FuzzRewriteURL looks for references that lead elsewhere than the application
// meant, or to an address of the inside.
func FuzzRewriteURL(f *testing.F) {
	for _, ref := range []string{"/a", "//a", "http://localhost:3000//a", "http://127.0.0.1:1/%2f", `/\a`, "http://10.11.0.7:3000?x", "https://a/b", "http://localhost:3000\\@evil/"} {
		f.Add(ref)
	}
	f.Fuzz(func(t *testing.T, ref string) {
		for _, o := range []origin{byHost, byPath} {
			got := o.rewriteURL(ref)
			if got == ref {
				continue
			}
			u, err := url.Parse(got)
			if err != nil {
				continue // ref was no URL either, or a client would not take it for one
			}
			if u.Host != "" && !strings.HasSuffix(u.Host, "-"+rewriteID+".wrenn.test:8443") {
				t.Errorf("%q became %q, which leads to %q", ref, got, u.Host)
			}
			if o.dest.Prefix != "" && !strings.HasPrefix(got, pathForm+rewriteID+"/") {
				t.Errorf("%q became %q, which leaves the sandbox", ref, got)
			}
			if strings.HasPrefix(got, "//") && u.Host == "" {
				t.Errorf("%q became %q", ref, got)
			}
		}
	})
}

// FuzzParsePath holds the path form against what it says it reads.
func FuzzParsePath(f *testing.F) {
	for _, path := range []string{"/proxy/" + rewriteID + "/80/x", "/proxy//80/", "/proxy/a/b", "/proxy/a/080", "/proxy/a%2F/80/"} {
		f.Add(path)
	}
	p := New(Config{})
	f.Fuzz(func(t *testing.T, path string) {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Host, r.RequestURI = "localhost:7080", path
		d, ok, err := p.Route(r)
		if err != nil || !ok {
			return
		}
		if rest, found := strings.CutPrefix(escapedPath(r), d.Prefix); !found || rest != "" && rest[0] != '/' && rest[0] != '?' {
			t.Errorf("%q is for %+v", path, d)
		}
		if !validID(d.SandboxID) || d.Port == 0 {
			t.Errorf("%q is for %+v", path, d)
		}
	})
}

func TestAMaskedHostIsTheApplication(t *testing.T) {
	const neighbour = "//8888-" + rewriteID + ".wrenn.test:8443"
	for _, tc := range []struct{ mask, ref, byHost, byPath string }{
		{"app.test:3000", "http://app.test:3000/next", "/next", "+/next"},
		{"app.test:3000", "https://APP.test:3000", "/", "+/"},
		{"app.test:3000", "//app.test:3000/next", "/next", "+/next"},
		{"app.test:3000", "http://me@app.test:3000?a=b", "/?a=b", "+/?a=b"},
		{"app.test:3000", "http://app.test:8888/next", neighbour + "/next", "/proxy/" + rewriteID + "/8888/next"},
		{"app.test:3000", "http://www.app.test:3000/next", "=", "="},
		{"app.test:3000", "http://app.test.evil:3000/next", "=", "="},
		{"app.test", "http://app.test/next", "/next", "+/next"},
		{"app.test", "https://app.test:443/next", "/next", "+/next"},
		{"app.test", "http://app.test:3000/next", "/next", "+/next"},
		{"app.test", "http://app.test:8888/next", "=", "="},
		{"app.test:80", "http://app.test/next", "/next", "+/next"},
		{"app.test:80", "http://app.test:8888/next", "=", "="},
		{"localhost:3000", "http://localhost:8888/next", neighbour + "/next", "/proxy/" + rewriteID + "/8888/next"},
		{"[2001:db8::1]:3000", "http://[2001:db8::1]:3000/next", "/next", "+/next"},
		{"app.test:3000", "http://:3000/next", "=", "="},
		// As the client knows it: some applications go by X-Forwarded-Host.
		{"app.test:3000", "https://3000-" + rewriteID + ".wrenn.test:8443/next", "=", "="},
	} {
		for o, want := range map[*origin]string{&byHost: tc.byHost, &byPath: tc.byPath} {
			masked := *o
			masked.mask = tc.mask
			want = strings.Replace(want, "+", byPath.dest.Prefix, 1)
			if want == "=" {
				want = tc.ref
			}
			if got := masked.rewriteURL(tc.ref); got != want {
				t.Errorf("as %s on %s: %q became %q, want %q", tc.mask, o.host, tc.ref, got, want)
			}
		}
	}
	masked := byHost
	masked.mask = "app.test:3000"
	if got := masked.rewriteCookie("a=b; Domain=app.test; Path=/"); got != "a=b; Path=/" {
		t.Errorf("a cookie of the masked host became %q", got)
	}
}
