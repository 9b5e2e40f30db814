package e2b_test

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/server/e2b"
)

func TestProtectedSandboxesShowTheirTokenToTheirOwner(t *testing.T) {
	r := newRig(t)
	created := r.create(map[string]any{"network": map[string]any{"allowPublicTraffic": false, "maskRequestHost": "app.test:${PORT}"}})
	id := created["sandboxID"].(string)
	token := created["trafficAccessToken"]
	if token == nil || token != any(r.plane.TrafficToken(idOf(id))) || token == created["envdAccessToken"] {
		t.Errorf("the traffic token is %v", token)
	}
	for _, path := range []string{"/v2/sandboxes/" + id + "/connect", "/sandboxes/" + id + "/connect"} {
		same(t, "token at connect", r.object(r.do("POST", path, `{"timeout":60}`), 200)["trafficAccessToken"], token)
	}
	detail := r.object(r.do("GET", "/sandboxes/"+id, nil), 200)
	same(t, "token in the detail", detail["trafficAccessToken"], token)
	same(t, "network", detail["network"], any(map[string]any{"allowPublicTraffic": false, "maskRequestHost": "app.test:${PORT}"}))
	r.fails(r.do("GET", "/sandboxes/"+id, nil, "X-API-Key", foreignKey), 404)

	public := r.create(map[string]any{"network": map[string]any{"denyOut": []string{"0.0.0.0/0"}}})
	if public["trafficAccessToken"] != nil {
		t.Error("a public sandbox shows a traffic token")
	}
	detail = r.object(r.do("GET", "/sandboxes/"+public["sandboxID"].(string), nil), 200)
	same(t, "network", detail["network"], any(map[string]any{"allowPublicTraffic": true, "denyOut": []any{"0.0.0.0/0"}}))
}

func TestPreviewLinksLeadWhereTheClientCanGo(t *testing.T) {
	r := newRig(t)
	id := r.create(map[string]any{})["sandboxID"].(string)
	byPath, byName := "/proxy/"+id+"/3000/", "3000-"+id+"."
	for _, c := range []struct {
		name   string
		config e2b.Config
		to     string // at which the API is asked
		want   string
	}{
		{"plain, by address", e2b.Config{Domain: "wrenn.localhost:7080"}, "http://192.0.2.1:7080", "http://192.0.2.1:7080" + byPath},
		{"plain, by the loopback's name", e2b.Config{Domain: "wrenn.localhost:7080"}, "http://localhost:7080", "http://localhost:7080" + byPath},
		{"plain, by the domain", e2b.Config{Domain: "wrenn.localhost:7080"}, "http://wrenn.localhost:7080", "http://" + byName + "wrenn.localhost:7080/"},
		{"plain, by the API's name", e2b.Config{Domain: "wrenn.localhost:7080"}, "http://api.wrenn.localhost:7080", "http://" + byName + "wrenn.localhost:7080/"},
		{"TLS, by the API's name", e2b.Config{Domain: "wrenn.test", TLS: true}, "https://api.wrenn.test", "https://" + byName + "wrenn.test/"},
		{"TLS, by the loopback", e2b.Config{Domain: "wrenn.test:8443", TLS: true}, "http://localhost:7080", "https://" + byName + "wrenn.test:8443/"},
		{"no domain", e2b.Config{}, "http://host:1", "http://host:1" + byPath},
	} {
		c.config.ControlPlane = r.plane
		req := httptest.NewRequest("POST", c.to+"/sandboxes/"+id+"/preview-links", strings.NewReader(`{"port":3000,"expiresIn":60}`))
		req.Header.Set("X-API-Key", key)
		w := httptest.NewRecorder()
		asked := time.Now()
		e2b.New(c.config).ServeHTTP(w, req)
		res := w.Result()
		res.Request = req
		got := r.object(answer{res, w.Body.Bytes()}, http.StatusCreated)
		to, query, _ := strings.Cut(got["url"].(string), "?")
		values, err := url.ParseQuery(query)
		if to != c.want || err != nil || len(values) != 1 || !strings.HasPrefix(values.Get("wrenn_preview"), "v1.") {
			t.Errorf("%s: %s, want %s with a link", c.name, got["url"], c.want)
		}
		expires, err := time.Parse(time.RFC3339, got["expiresAt"].(string))
		if err != nil || expires.Before(asked.Add(time.Minute)) || expires.After(time.Now().Add(61*time.Second)) {
			t.Errorf("%s: expires at %v (%v), asked at %v for a minute", c.name, expires, err, asked)
		}
	}
	expiry := func(body string) time.Duration {
		got := r.object(r.do("POST", "/sandboxes/"+id+"/preview-links", body), 201)
		expires, _ := time.Parse(time.RFC3339, got["expiresAt"].(string))
		return time.Until(expires).Round(time.Minute)
	}
	same(t, "by default", expiry(`{"port":80}`), time.Hour)
	same(t, "at most", expiry(`{"port":80,"expiresIn":604800}`), 7*24*time.Hour)
	r.fails(r.do("POST", "/sandboxes/"+id+"/preview-links", `{"port":80}`, "X-API-Key", foreignKey), 404)
	r.fails(r.do("POST", "/sandboxes/"+id+"/preview-links", `{"port":80}`, "X-API-Key", ""), 401)
	r.empty(r.do("DELETE", "/sandboxes/"+id, nil))
	r.fails(r.do("POST", "/sandboxes/"+id+"/preview-links", `{"port":80}`), 404)
}
