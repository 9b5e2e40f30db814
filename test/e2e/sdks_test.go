package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// The SDKs are installed once into the cache, at the versions of the lock files.

var installing sync.Mutex

// installJS installs the JavaScript SDK and returns the directory with the tests
// beside it, and the node to run them with.
func installJS(t *testing.T) (dir, node string) {
	t.Helper()
	defer lockCache(t)()
	dir = filepath.Join(suite.cache, "js")
	files, err := filepath.Glob("js/*.*")
	if err != nil {
		t.Fatal(err)
	}
	old, _ := filepath.Glob(filepath.Join(dir, "*.mjs"))
	for _, f := range old {
		os.Remove(f)
	}
	copyInto(t, dir, files...)
	npm := tool(t, "npm", "nodejs", "npm")
	node = tool(t, "node", "nodejs")
	if version, _ := exec.Command(node, "--version").Output(); !regexp.MustCompile(`^v(2\d|[3-9]\d)\.`).Match(version) {
		t.Skipf("E2B's SDK needs Node.js 20.18 or newer, and %s is %s", node, version)
	}
	once(t, dir, "js/package-lock.json", func() *exec.Cmd {
		cmd := exec.Command(npm, "ci", "--no-audit", "--no-fund", "--loglevel=error")
		cmd.Dir = dir
		return cmd
	})
	return dir, node
}

// installPython installs the Python SDK and returns the interpreter that has it.
func installPython(t *testing.T) string {
	t.Helper()
	defer lockCache(t)()
	dir := filepath.Join(suite.cache, "python")
	python := filepath.Join(dir, "venv", "bin", "python")
	once(t, dir, "python/requirements.txt", func() *exec.Cmd {
		python3 := tool(t, "python3", "python3")
		out, err := exec.Command(python3, "-m", "venv", "--clear", filepath.Join(dir, "venv")).CombinedOutput()
		if err != nil && strings.Contains(string(out), "ensurepip") {
			install(t, "python3-venv")
			out, err = exec.Command(python3, "-m", "venv", "--clear", filepath.Join(dir, "venv")).CombinedOutput()
		}
		if err != nil {
			t.Fatalf("make virtual environment: %v\n%s", err, out)
		}
		return exec.Command(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", "python/requirements.txt")
	})
	return python
}

// once runs a command unless it has succeeded with this lock file before.
func once(t *testing.T, dir, lockFile string, command func() *exec.Cmd) {
	t.Helper()
	lock, err := os.ReadFile(lockFile)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(lock)
	stamp, want := filepath.Join(dir, "installed"), hex.EncodeToString(sum[:])
	if got, _ := os.ReadFile(stamp); string(got) == want {
		return
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	os.Remove(stamp)
	if out, err := command().CombinedOutput(); err != nil {
		if unreachable.Match(out) {
			t.Skipf("the package registry cannot be reached:\n%s", out)
		}
		t.Fatalf("install what %s names: %v\n%s", lockFile, err, out)
	}
	if err := os.WriteFile(stamp, []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
}

// unreachable is how package managers say that there is no network.
var unreachable = regexp.MustCompile(`ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ENETUNREACH|EHOSTUNREACH|ETIMEDOUT|Temporary failure|Network is unreachable|Failed to establish a new connection|ConnectTimeout|Could not connect`)

// tool returns the path of a program, installing the packages that have it.
func tool(t *testing.T, program string, packages ...string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		install(t, packages...)
		if path, err = exec.LookPath(program); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func install(t *testing.T, packages ...string) {
	t.Helper()
	apt, err := exec.LookPath("apt-get")
	if err != nil {
		t.Skipf("needs %v, and this is no Debian to install them on", packages)
	}
	for _, args := range [][]string{{"update", "-q"}, append([]string{"install", "-qy", "--no-install-recommends"}, packages...)} {
		if out, err := exec.Command(apt, args...).CombinedOutput(); err != nil {
			if unreachable.Match(out) {
				t.Skipf("needs %v, and the package archive cannot be reached:\n%s", packages, out)
			}
			t.Fatalf("apt-get %v: %v\n%s", args, err, out)
		}
	}
}

// lockCache keeps others, in this process and out of it, from the cache.
func lockCache(t *testing.T) (unlock func()) {
	t.Helper()
	installing.Lock()
	f, err := os.OpenFile(filepath.Join(suite.cache, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		installing.Unlock()
		t.Fatal(err)
	}
	return func() { f.Close(); installing.Unlock() }
}

func copyInto(t *testing.T, dir string, files ...string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, filepath.Base(f)), data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
