package sandbox_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/wrenn/wrenn/internal/sandbox"
)

func TestAMaskIsAHostWithOrWithoutAPort(t *testing.T) {
	for _, good := range []string{
		"localhost", "localhost:${PORT}", "custom-host.example.com:${PORT}", "${PORT}.app.test", "app_1.test:80",
		"127.0.0.1:8080", "[::1]", "[2001:db8::1]:${PORT}", strings.Repeat("a", 63),
	} {
		if err := sandbox.CheckMaskRequestHost(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{
		"", ":80", "app:", "app:0", "app:65536", "app:-1", "app:+1", "app:x", "app:80:80", "http://app", "app/x", "app?x", "me@app",
		"app test", "app\r\nX: y", "app\x00", "grüße", "${HOST}", "$PORT", "${port}", "app:${PORT}${PORT}", "[]", "[::1", "::1", "[::1]x", "[x/y]",
		"<b>", `a"b`, strings.Repeat("a", 254), strings.Repeat("${PORT}", 51),
	} {
		if err := sandbox.CheckMaskRequestHost(bad); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q: %v, want an error of kind ErrInvalid", bad, err)
		}
	}
}
