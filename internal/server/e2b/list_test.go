package e2b

import (
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// encode makes a filter of one pair as the SDKs do, up to the query's own encoding.
func encode(name, value string) string {
	component := func(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }
	twice := func(s string) string { return url.QueryEscape(component(s)) }
	return twice(name) + "=" + twice(value)
}

func FuzzMetadataFilter(f *testing.F) {
	for _, s := range []string{"", "a=b", "a%3Db%2520c", "a=b&c=d", "=", "&", "a", "%", "%25", "a=%00", "a=b=c"} {
		f.Add(s, "k", "v")
	}
	f.Add("x", "k&= +%", "ü/\n")
	f.Fuzz(func(t *testing.T, raw, name, value string) {
		got, err := parseMetadata(raw)
		if err != nil && sandbox.Kind(err) != sandbox.ErrInvalid {
			t.Errorf("error without its kind: %v", err)
		}
		for k, v := range got {
			if strings.Contains(k+v, "\x00") {
				t.Errorf("%q became NUL in %q: %q", raw, k, v)
			}
		}
		if strings.Contains(name+value, "\x00") {
			return
		}
		got, err = parseMetadata(encode(name, value))
		if diff := cmp.Diff(map[string]string{name: value}, got); err != nil || diff != "" {
			t.Errorf("%q=%q comes back as %q, %v", name, value, got, err)
		}
	})
}

func FuzzNextToken(f *testing.F) {
	f.Add("", int64(1))
	f.Add(formatToken(store.Cursor{Started: time.Unix(1, 2), ID: sandbox.NewID()}), int64(1_700_000_000_123_456_789))
	f.Add("MSBhYWFhYWFhYWFhYWFhYWFhYWFhYQ", int64(-1))
	f.Fuzz(func(t *testing.T, raw string, nanos int64) {
		c, err := parseToken(raw)
		switch {
		case err == nil && (len(c.ID) != sandbox.IDLength || c.Started.UnixNano() <= 0):
			t.Errorf("%q became %+v", raw, c)
		case err != nil && sandbox.Kind(err) != sandbox.ErrInvalid:
			t.Errorf("error without its kind: %v", err)
		}
		if nanos <= 0 {
			return
		}
		want := store.Cursor{Started: time.Unix(0, nanos).UTC(), ID: sandbox.NewID()}
		if got, err := parseToken(formatToken(want)); err != nil || got != want {
			t.Errorf("%+v comes back as %+v, %v", want, got, err)
		}
	})
}
