package e2b_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/wrenn/wrenn/internal/server/e2b"
)

func TestPlatformMetricsAreForTheOperatorsTeam(t *testing.T) {
	r := newRig(t)
	r.fails(r.do("GET", "/metrics", nil), 404) // this API was given none

	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "metrics") })
	srv := httptest.NewServer(e2b.New(e2b.Config{ControlPlane: r.plane, Metrics: metrics}))
	t.Cleanup(srv.Close)
	r.url = srv.URL
	for _, headers := range [][]string{
		{"X-API-Key", key},
		{"X-API-Key", "", "Authorization", "Bearer " + key},
	} {
		if a := r.do("GET", "/metrics", nil, headers...); a.StatusCode != 200 || string(a.body) != "metrics" {
			t.Errorf("with %q: %d %s", headers, a.StatusCode, a.body)
		}
	}
	r.fails(r.do("GET", "/metrics", nil, "X-API-Key", foreignKey), 403)
	r.fails(r.do("GET", "/metrics", nil, "X-API-Key", ""), 401)
	r.fails(r.do("GET", "/metrics", nil, "X-API-Key", "", "Authorization", "Bearer e2b_no"), 401)
	r.fails(r.do("POST", "/metrics", nil), 405)
}
