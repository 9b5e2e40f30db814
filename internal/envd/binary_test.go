package envd_test

import (
	"debug/elf"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// goTool runs the go command as a release build would.
func goTool(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	out, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("no go command to build with")
	}
	if err != nil {
		t.Fatal(err, string(out))
	}
	return string(out)
}

func TestTheAgentImportsNothingOfThePlatformButItsMessages(t *testing.T) {
	const ours = "github.com/wrenn/wrenn/"
	seen := 0
	for path := range strings.FieldsSeq(goTool(t, "list", "-deps", "../../cmd/envd")) {
		rest, isOurs := strings.CutPrefix(path, ours)
		switch {
		case path == "C" || path == "runtime/cgo":
			t.Errorf("the agent needs C: it imports %s", path)
		case strings.HasPrefix(path, "gvisor.dev/"):
			t.Errorf("the agent imports %s", path)
		case !isOurs:
		case rest == "cmd/envd" || rest == "internal/envd" || strings.HasPrefix(rest, "internal/envd/") || strings.HasPrefix(rest, "api/proto/"):
			seen++
		default:
			t.Errorf("the agent imports %s", path)
		}
	}
	if seen < 3 {
		t.Fatalf("only %d packages of ours listed", seen)
	}
}

func TestTheAgentIsOneSmallFileThatNeedsNoOther(t *testing.T) {
	path := filepath.Join(t.TempDir(), "envd")
	goTool(t, "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "../../cmd/envd")
	const most = 16 << 20
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Size() > most {
		t.Errorf("it has %d bytes, more than %d", fi.Size(), most)
	}
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("it has a segment %v: it is not static", p.Type)
		}
	}
	if libs, _ := f.ImportedLibraries(); len(libs) > 0 {
		t.Errorf("it needs %v", libs)
	}
}
