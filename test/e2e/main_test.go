// Package e2e tests the program as its users have it: it starts `wrenn up` and
// talks to it with E2B's own SDKs, with the wrenn command and over HTTP, and it
// kills, starves and floods it.
//
// WRENN_BIN is the program to test (default: bin/wrenn of this checkout),
// WRENN_TEST_DATA the directory for templates and platforms (default:
// /var/tmp/wrenn-test), WRENN_TEST_CACHE that for SDKs (default: .cache/e2e of
// this checkout).
package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/template"
)

// suite is what all tests share; TestMain sets it.
var suite struct {
	bin   string         // the program to test
	data  string         // parent of the platforms' data directories
	cache string         // where the SDKs are installed
	base  template.Build // the template that all platforms share
	skip  string         // why nothing can be tested here, or empty
}

func TestMain(m *testing.M) {
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, "prepare end-to-end tests:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func prepare() error {
	root, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		suite.skip = "needs root: the platform makes network namespaces and cgroups"
		return nil
	}
	if suite.bin, err = filepath.Abs(setting("WRENN_BIN", filepath.Join(root, "bin", "wrenn"))); err != nil {
		return err
	}
	if _, err := os.Stat(suite.bin); err != nil {
		return fmt.Errorf("%w: build it with `make build`, or set WRENN_BIN", err)
	}
	shared := setting("WRENN_TEST_DATA", "/var/tmp/wrenn-test")
	suite.data = filepath.Join(shared, "e2e")
	suite.cache = setting("WRENN_TEST_CACHE", filepath.Join(root, ".cache", "e2e"))
	for _, dir := range []string{suite.data, suite.cache} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if suite.data, err = filepath.EvalSymlinks(suite.data); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	suite.base, err = template.EnsureBase(ctx, template.Config{
		Dir: filepath.Join(shared, "templates"), TrustHostCAs: true, Progress: os.Stderr,
	})
	return err
}

func setting(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// eventually waits until check returns nil, and fails the test with its last
// error when that takes longer than limit.
func eventually(t testing.TB, limit time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s: %v", what, limit, err)
		}
		time.Sleep(20 * time.Millisecond) // between two looks at the condition
	}
}
