package tlscert

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/libdns/libdns"

	"github.com/wrenn/wrenn/internal/server/tlscert/acmetest"
)

var challenge = []libdns.Record{libdns.TXT{Name: "_acme-challenge.boxes", Text: "proof"}}

func TestSignedUpdatesChangeAZoneAndOthersDoNot(t *testing.T) {
	zone := acmetest.NewZone(t, "wrenn.test")
	right := rfc2136{server: zone.Addr, keyName: acmetest.KeyName, algorithm: "hmac-sha256.", secret: acmetest.KeySecret}
	other := []libdns.Record{libdns.TXT{Name: "_acme-challenge.boxes", Text: "of the wildcard"}}
	for _, records := range [][]libdns.Record{challenge, other} {
		if _, err := right.AppendRecords(t.Context(), "wrenn.test.", records); err != nil {
			t.Fatal(err)
		}
	}
	if got := zone.TXT("_acme-challenge.boxes.wrenn.test"); !slices.Equal(got, []string{"proof", "of the wildcard"}) {
		t.Errorf("records: %v", got)
	}
	if _, err := right.DeleteRecords(t.Context(), "wrenn.test", challenge); err != nil {
		t.Fatal(err)
	}
	if got := zone.TXT("wrenn.test"); !slices.Equal(got, []string{"of the wildcard"}) {
		t.Errorf("after one was removed: %v", got)
	}

	wrongKey, wrongSecret, unsigned, elsewhere := right, right, right, right
	wrongKey.keyName = "another."
	wrongSecret.secret = "AAAA"
	unsigned.keyName = ""
	for what, p := range map[string]rfc2136{"another key": wrongKey, "another secret": wrongSecret, "no key": unsigned} {
		_, err := p.AppendRecords(t.Context(), "wrenn.test.", challenge)
		if err == nil || strings.Contains(err.Error(), acmetest.KeySecret) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := right.AppendRecords(t.Context(), "other.test.", challenge); err == nil || !strings.Contains(err.Error(), "REFUSED") {
		t.Errorf("a zone that is not there: %v", err)
	}
	elsewhere.server = "127.0.0.1:1"
	if _, err := elsewhere.AppendRecords(t.Context(), "wrenn.test.", challenge); err == nil || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("no server: %v", err)
	}
	if got := zone.TXT("wrenn.test"); len(got) != 1 {
		t.Errorf("in the end: %v", got)
	}
}

func TestProvidersSayWhichSettingIsMissing(t *testing.T) {
	secretFile := func(mode os.FileMode) string {
		path := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(path, []byte(acmetest.KeySecret+"\n"), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, c := range []struct {
		provider string
		env      string // NAME=VALUE …
		wrong    string // what the error says; empty: it is right
	}{
		{"route66", "", "there are cloudflare, rfc2136"},
		{"cloudflare", "", "CLOUDFLARE_API_TOKEN"},
		{"cloudflare", "CLOUDFLARE_API_TOKEN=t", ""},
		{"cloudflare", "CLOUDFLARE_API_TOKEN_FILE=" + secretFile(0o600), ""},
		{"cloudflare", "CLOUDFLARE_API_TOKEN_FILE=" + secretFile(0o644), "chmod 600"},
		{"cloudflare", "CLOUDFLARE_API_TOKEN_FILE=/nowhere/token", "no such file"},
		{"rfc2136", "", "RFC2136_NAMESERVER"},
		{"rfc2136", "RFC2136_NAMESERVER=127.0.0.1", ""},
		{"rfc2136", "RFC2136_NAMESERVER=127.0.0.1 RFC2136_TSIG_KEY=k", "go together"},
		{"rfc2136", "RFC2136_NAMESERVER=127.0.0.1 RFC2136_TSIG_KEY=k RFC2136_TSIG_SECRET=!", "base64"},
		{"rfc2136", "RFC2136_NAMESERVER=127.0.0.1 RFC2136_TSIG_KEY=k RFC2136_TSIG_SECRET=AAAA RFC2136_TSIG_ALGORITHM=md5", "hmac-sha256"},
		{"rfc2136", "RFC2136_NAMESERVER=127.0.0.1 RFC2136_TSIG_KEY=k RFC2136_TSIG_SECRET_FILE=" + secretFile(0o600) + " RFC2136_TSIG_ALGORITHM=HMAC-SHA512", ""},
	} {
		t.Run(c.provider+" "+c.env, func(t *testing.T) {
			for _, kv := range strings.Fields(c.env) {
				k, v, _ := strings.Cut(kv, "=")
				t.Setenv(k, v)
			}
			_, err := NewDNSProvider(c.provider)
			if (c.wrong == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), c.wrong)) {
				t.Errorf("%v, want %q", err, c.wrong)
			}
			for _, secret := range []string{"CLOUDFLARE_API_TOKEN", "RFC2136_TSIG_SECRET"} {
				if v, ok := os.LookupEnv(secret); ok && c.wrong == "" {
					t.Errorf("%s is still %q for whatever is started later", secret, v)
				}
			}
		})
	}
}

func TestAddressesGetTheUsualPort(t *testing.T) {
	for addr, want := range map[string]string{
		"ns.example.com": "ns.example.com:53", "ns.example.com:5353": "ns.example.com:5353",
		"192.0.2.1": "192.0.2.1:53", "2001:db8::1": "[2001:db8::1]:53", "[2001:db8::1]": "[2001:db8::1]:53", "[2001:db8::1]:54": "[2001:db8::1]:54",
	} {
		if got := withPort(addr, "53"); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
}

// The API answers as Cloudflare's documentation says it does.
func TestCloudflareRecordsAreMadeAndRemoved(t *testing.T) {
	records := make(map[string]cloudflareRecord)
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, status int, success bool, result any, problem string) {
		body := map[string]any{"success": success, "result": result, "errors": []any{}}
		if problem != "" {
			body["errors"] = []any{map[string]any{"code": 9109, "message": problem}}
		}
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(body)
	}
	mux.HandleFunc("GET /zones", func(w http.ResponseWriter, r *http.Request) {
		result := []map[string]string{}
		if r.FormValue("name") == "wrenn.test" {
			result = append(result, map[string]string{"id": "z1"})
		}
		answer(w, 200, true, result, "")
	})
	mux.HandleFunc("POST /zones/z1/dns_records", func(w http.ResponseWriter, r *http.Request) {
		var record cloudflareRecord
		if err := json.NewDecoder(r.Body).Decode(&record); err != nil {
			t.Error(err)
		}
		record.ID = fmt.Sprintf("r%d", len(records)+1)
		records[record.ID] = record
		answer(w, 200, true, record, "")
	})
	mux.HandleFunc("DELETE /zones/z1/dns_records/{id}", func(w http.ResponseWriter, r *http.Request) {
		delete(records, r.PathValue("id"))
		answer(w, 200, true, map[string]string{"id": r.PathValue("id")}, "")
	})
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Header.Get("Authorization") {
		case "Bearer right":
			mux.ServeHTTP(w, r)
		case "Bearer none":
			io.WriteString(w, "<html>")
		default:
			answer(w, 403, false, nil, "Invalid access token")
		}
	}))
	defer api.Close()

	p := newCloudflareAt(api.URL, "right")
	defer p.client.CloseIdleConnections()
	made, err := p.AppendRecords(t.Context(), "wrenn.test.", challenge)
	if err != nil {
		t.Fatal(err)
	}
	if r := records["r1"]; r.Type != "TXT" || r.Name != "_acme-challenge.boxes.wrenn.test" || r.Content != `"proof"` || r.TTL < 60 {
		t.Errorf("made %+v", r)
	}
	if len(made) != 1 || made[0].RR().Data != "proof" {
		t.Errorf("says that it made %v", made)
	}
	if _, err := p.DeleteRecords(t.Context(), "wrenn.test.", made); err != nil || len(records) != 0 {
		t.Errorf("left %v: %v", records, err)
	}
	if _, err := p.DeleteRecords(t.Context(), "wrenn.test.", challenge); err == nil {
		t.Error("removed a record that is not ours")
	}
	if _, err := p.AppendRecords(t.Context(), "other.test.", challenge); err == nil || !strings.Contains(err.Error(), "no zone other.test") {
		t.Errorf("another zone: %v", err)
	}
	for token, want := range map[string]string{"wrong": "Invalid access token", "none": "200"} {
		_, err := newCloudflareAt(api.URL, token).AppendRecords(t.Context(), "wrenn.test.", challenge)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), token+" ") {
			t.Errorf("token %s: %v", token, err)
		}
	}
}
