package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"time"
)

// visit fetches an address, with a traffic token or without.
func (b *box) visit(address, token string) (int, string, error) {
	req, err := http.NewRequest("GET", address, nil)
	if err != nil {
		return 0, "", err
	}
	if token != "" {
		req.Header.Set("e2b-traffic-access-token", token)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return res.StatusCode, string(body), err
}

func TestProtectionOutlivesAKilledPlatform(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	var made struct {
		SandboxID, EnvdAccessToken, TrafficAccessToken string
	}
	if err := json.Unmarshal([]byte(p.wrenn("sandbox", "create", "--protected", "--mask-host", "masked.test", "--json")), &made); err != nil {
		t.Fatal(err)
	}
	b := p.box(made.SandboxID, made.EnvdAccessToken)
	b.background(`exec python3 -c '
import http.server
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(("%s %s" % (self.path, self.headers["Host"])).encode())
http.server.HTTPServer(("", 8000), Answer).serve_forever()'`, false)
	address := fmt.Sprintf("%s/proxy/%s/8000/page", p.url, b.id)
	eventually(t, 15*time.Second, "the port answers", func() error {
		status, body, err := b.visit(address, made.TrafficAccessToken)
		if status != 200 || body != "/page masked.test" {
			return fmt.Errorf("%d %q %v", status, body, err)
		}
		return nil
	})
	link := strings.TrimSpace(p.wrenn("sandbox", "link", b.id, "8000", "--expires", "10m"))
	if want := fmt.Sprintf("%s/proxy/%s/8000/?wrenn_preview=", p.url, b.id); !strings.HasPrefix(link, want) {
		t.Fatalf("the link is %s, want %s…", link, want)
	}
	short := strings.TrimSpace(p.wrenn("sandbox", "link", b.id, "8000", "--expires", "1s"))
	otherPort := strings.Replace(link, "/8000/", "/8001/", 1)
	check := func(when string) {
		t.Helper()
		for _, c := range []struct {
			what, address, token string
			status               int
			says                 string
		}{
			{"without a token", address, "", 403, "This port is protected"},
			{"with a wrong token", address, "x", 403, "token is wrong"},
			{"with the token", address, made.TrafficAccessToken, 200, "/page masked.test"},
			{"with the guest agent's token", address, made.EnvdAccessToken, 403, "token is wrong"},
			{"with the link", link, "", 200, "/ masked.test"},
			{"with the link, further on", strings.Replace(link, "/?", "/a/b?c=d&", 1), "", 200, "/a/b?c=d masked.test"},
			{"with the link, at another port", otherPort, "", 403, "not valid"},
		} {
			status, body, err := b.visit(c.address, c.token)
			if err != nil || status != c.status || !strings.Contains(body, c.says) {
				t.Errorf("%s, %s: %d %s %v, want %d %q", when, c.what, status, body, err, c.status, c.says)
			}
		}
	}
	check("before")
	p.end(syscall.SIGKILL)
	p.start()
	check("after a restart")
	if got := b.run("echo still here"); got != "still here\n" {
		t.Errorf("the guest agent says %q", got)
	}
	eventually(t, 10*time.Second, "the short link expires", func() error {
		status, body, err := b.visit(short, "")
		if status != 403 || !strings.Contains(body, "expired") {
			return fmt.Errorf("%d %q %v", status, body, err)
		}
		return nil
	})
	t.Run("the secrets are not in the log", func(t *testing.T) {
		u, err := url.Parse(link)
		if err != nil {
			t.Fatal(err)
		}
		for what, secret := range map[string]string{"traffic token": made.TrafficAccessToken, "link": u.Query().Get("wrenn_preview")} {
			if secret == "" || strings.Contains(p.logTail(), secret) {
				t.Errorf("the %s is in the log, or empty", what)
			}
		}
	})
	b.kill()
	if status, body, _ := b.visit(link, ""); status != 502 {
		t.Errorf("the link to an ended sandbox: %d %s", status, body)
	}
}
