package access

import (
	"net/http"
	"net/url"
	"testing"
	"time"
)

func TestSignMatchesTheKnownVector(t *testing.T) {
	got := Sign("hello.txt", Read, "user", "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0", "")
	if want := "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func FuzzCheckFileLetsOnlyTheSignedQueryIn(f *testing.F) {
	const token, path = "token", "/f"
	good := Sign(path, Read, "", token, "")
	f.Add("path=/f&signature=" + url.QueryEscape(good))
	f.Add("path=/f&signature=" + url.QueryEscape(Sign(path, Read, "", token, "99999999999")) + "&signature_expiration=99999999999")
	f.Add("path=/f&signature=v1_&signature_expiration=")
	f.Add("signature_expiration=-1&signature=%00")
	f.Fuzz(func(t *testing.T, raw string) {
		query, _ := url.ParseQuery(raw)
		var g Guard
		g.Set(token)
		if err := g.CheckFile(http.Header{}, query, Read, time.Unix(1000, 0)); err != nil {
			return
		}
		expiry := query.Get("signature_expiration")
		if query.Get("signature") != Sign(query.Get("path"), Read, query.Get("username"), token, expiry) {
			t.Errorf("let in: %q", raw)
		}
		if query.Has("signature_expiration") && expiry == "" {
			t.Errorf("let in without the expiry it claims: %q", raw)
		}
	})
}
