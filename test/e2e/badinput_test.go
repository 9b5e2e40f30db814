package e2e

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestBadInputIsRefusedAndCreatesNothing(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	b := p.create(nil)
	big := strings.Repeat("x", 9<<20)
	for _, c := range []struct {
		name, method, path string
		body               any
		want               int
	}{
		{"no body", "POST", "/v2/sandboxes", nil, 400},
		{"no JSON", "POST", "/v2/sandboxes", "{", 400},
		{"an array", "POST", "/v2/sandboxes", "[]", 400},
		{"no template", "POST", "/v2/sandboxes", "{}", 400},
		{"template of a wrong type", "POST", "/v2/sandboxes", `{"templateID":7}`, 400},
		{"template with a path", "POST", "/v2/sandboxes", `{"templateID":"../../etc"}`, 0},
		{"template with NUL", "POST", "/v2/sandboxes", `{"templateID":"base\u0000"}`, 0},
		{"timeout zero", "POST", "/v2/sandboxes", `{"templateID":"base","timeout":0}`, 400},
		{"timeout negative", "POST", "/sandboxes", `{"templateID":"base","timeout":-5}`, 400},
		{"timeout huge", "POST", "/v2/sandboxes", `{"templateID":"base","timeout":9223372036854775807}`, 400},
		{"timeout beyond integers", "POST", "/v2/sandboxes", `{"templateID":"base","timeout":1e30}`, 400},
		{"timeout as text", "POST", "/v2/sandboxes", `{"templateID":"base","timeout":"5"}`, 400},
		{"metadata of a wrong type", "POST", "/v2/sandboxes", `{"templateID":"base","metadata":{"a":1}}`, 400},
		{"variable without a name", "POST", "/v2/sandboxes", `{"templateID":"base","envVars":{"":"x"}}`, 400},
		{"variable with NUL", "POST", "/v2/sandboxes", `{"templateID":"base","envVars":{"A":"a\u0000b"}}`, 400},
		{"oversized body", "POST", "/v2/sandboxes", `{"templateID":"` + big + `"}`, 0},
		{"unknown sandbox", "GET", "/sandboxes/aaaaaaaaaaaaaaaaaaaa", nil, 404},
		{"malformed id", "GET", "/sandboxes/%00%0a..", nil, 0},
		{"id with a path", "DELETE", "/sandboxes/..%2f..%2fetc", nil, 0},
		{"unknown route", "GET", "/no/such/route", nil, 404},
		{"wrong method", "PATCH", "/sandboxes/" + b.id, nil, 0},
		{"limit too large", "GET", "/v2/sandboxes?limit=1000", nil, 400},
		{"limit no number", "GET", "/v2/sandboxes?limit=x", nil, 400},
		{"page token of nobody's", "GET", "/v2/sandboxes?nextToken=%ff%00", nil, 400},
		{"state that is none", "GET", "/v2/sandboxes?state=dancing", nil, 400},
		{"setting a negative timeout", "POST", "/sandboxes/" + b.id + "/timeout", `{"timeout":-1}`, 400},
		{"refresh beyond an hour", "POST", "/sandboxes/" + b.id + "/refreshes", `{"duration":999999}`, 400},
		{"metrics of a bad time", "GET", "/sandboxes/" + b.id + "/metrics?start=yesterday", nil, 400},
		{"pause of a wrong type", "POST", "/sandboxes/" + b.id + "/pause", `{"memory":"yes"}`, 400},
		{"pause of an unknown sandbox", "POST", "/sandboxes/aaaaaaaaaaaaaaaaaaaa/pause", nil, 404},
		{"resume of one that runs", "POST", "/sandboxes/" + b.id + "/resume", nil, 409},
		{"too many forks", "POST", "/sandboxes/" + b.id + "/fork", `{"count":101}`, 400},
		{"snapshot with a path for a name", "POST", "/sandboxes/" + b.id + "/snapshots", `{"name":"../x"}`, 400},
		{"unknown snapshot", "DELETE", "/templates/aaaaaaaaaaaaaaaaaaaa:default", nil, 404},
		{"a network change, which is not served", "PUT", "/sandboxes/" + b.id + "/network", `{}`, 501},
	} {
		status, answer := p.api(c.method, c.path, c.body)
		var shape struct {
			Code    int
			Message string
		}
		if json.Unmarshal(answer, &shape) != nil || shape.Code != status || shape.Message == "" {
			t.Errorf("%s: %d %.300s, which is not the shape of an error", c.name, status, answer)
		}
		if (c.want != 0 && status != c.want) || (c.want == 0 && status/100 != 4) {
			t.Errorf("%s: %d %.300s, want %d", c.name, status, answer, c.want)
		}
	}
	if ids := p.running(); len(ids) != 1 || ids[0] != b.id {
		t.Errorf("running: %v, want only %s", ids, b.id)
	}
	b.stillWorks()
}

func TestKeysThatAreNotTheTeamsAreRefused(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	key := p.key
	for _, wrong := range []string{"", "e2b_" + strings.Repeat("0", 40), key[:len(key)-1], key + "0", strings.ToUpper(key), "' OR 1=1 --"} {
		p.key = wrong
		if status, body := p.api("GET", "/v2/sandboxes", nil); status != http.StatusUnauthorized {
			t.Errorf("key %q: %d %s", wrong, status, body)
		}
	}
	p.key = key
}

func TestMalformedDataPlaneRequestsAreRefused(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	b := p.create(nil)
	for _, host := range []string{
		"0-" + b.id, "65536-" + b.id, "-1-" + b.id, "99999999999999999999-" + b.id, "x-" + b.id,
		"8000-", "8000-..", "8000-" + strings.Repeat("a", 200), "8000-" + strings.ToUpper(b.id) + "x",
	} {
		request := "GET / HTTP/1.1\r\nHost: " + host + ".wrenn.localhost\r\nConnection: close\r\n\r\n"
		if status := raw(t, p, request); status < 400 || status == 500 {
			t.Errorf("host %q: %d", host, status)
		}
	}
	for _, request := range []string{
		"GET / HTTP/1.1\r\nE2b-Sandbox-Id: " + b.id + "\r\nE2b-Sandbox-Port: 70000\r\nHost: localhost\r\nConnection: close\r\n\r\n",
		"GET / HTTP/1.1\r\nE2b-Sandbox-Id: ../../x\r\nE2b-Sandbox-Port: 80\r\nHost: localhost\r\nConnection: close\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
		"nonsense\r\n\r\n",
	} {
		if status := raw(t, p, request); status < 400 || status == 500 {
			t.Errorf("%q: %d", request, status)
		}
	}
	b.stillWorks()
}

// raw sends bytes and returns the status of the answer.
func raw(t *testing.T, p *platform, request string) int {
	t.Helper()
	conn, err := net.DialTimeout("tcp", p.listen, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(conn, request)
	answer, _ := io.ReadAll(io.LimitReader(conn, 12))
	if len(answer) < 12 || !strings.HasPrefix(string(answer), "HTTP/1.1 ") {
		t.Fatalf("answer to %q: %q", request, answer)
	}
	return int(answer[9]-'0')*100 + int(answer[10]-'0')*10 + int(answer[11]-'0')
}
