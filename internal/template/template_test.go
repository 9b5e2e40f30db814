package template

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/artifact"
)

// tinyBuild stands in for the real build where what comes out is not the point.
func tinyBuild(_ context.Context, _ recipe, dir, _ string, _ *progress) error {
	status := filepath.Join(dir, rootfsName, "var/lib/dpkg/status")
	if err := os.MkdirAll(filepath.Dir(status), 0o755); err != nil {
		return err
	}
	return os.WriteFile(status, []byte("Package: git\nStatus: install ok installed\nVersion: 1:2.39\n\nPackage: bash\nVersion: 5.2\n"), 0o644)
}

func testRecipe(version int) recipe { return recipe{Version: version, Suite: "s", Arch: "a"} }

func TestABuildIsMadeOnceAndLoadedAgain(t *testing.T) {
	cfg := Config{Dir: filepath.Join(t.TempDir(), "templates")}
	if builds, err := Load(cfg.Dir); err != nil || len(builds) != 0 {
		t.Fatalf("Load before any build: %v, %v", builds, err)
	}
	made, err := ensure(t.Context(), cfg, testRecipe(1), tinyBuild)
	if err != nil {
		t.Fatal(err)
	}
	if made.Packages["git"] != "1:2.39" || made.Packages["bash"] != "5.2" || len(made.Packages) != 2 {
		t.Errorf("packages: %v", made.Packages)
	}
	if fi, err := os.Stat(made.RootFS); err != nil || !fi.IsDir() || !filepath.IsAbs(made.RootFS) {
		t.Errorf("root filesystem %q: %v", made.RootFS, err)
	}
	again, err := ensure(t.Context(), cfg, testRecipe(1), func(context.Context, recipe, string, string, *progress) error {
		return errors.New("built a second time")
	})
	if err != nil || again.Digest != made.Digest || !again.Created.Equal(made.Created) {
		t.Errorf("second time: %+v, %v", again, err)
	}
	other, err := ensure(t.Context(), cfg, testRecipe(2), tinyBuild)
	if err != nil || other.ID == made.ID {
		t.Fatalf("another recipe: %+v, %v", other, err)
	}
	builds, err := Load(cfg.Dir)
	if err != nil || len(builds) != 2 || builds[0].ID != other.ID || builds[1].ID != made.ID {
		t.Errorf("Load: %+v, %v; want the newer first", builds, err)
	}
}

func TestManyWhoAskAtOnceShareOneBuild(t *testing.T) {
	cfg := Config{Dir: t.TempDir()}
	var count atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			_, err := ensure(t.Context(), cfg, testRecipe(1), func(ctx context.Context, r recipe, dir, log string, p *progress) error {
				count.Add(1)
				return tinyBuild(ctx, r, dir, log, p)
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := count.Load(); n != 1 {
		t.Errorf("built %d times", n)
	}
}

func TestWhoWaitsForAnotherBuildSaysSoAndCanGiveUp(t *testing.T) {
	dir := t.TempDir()
	unlock, err := artifact.Lock(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	result := make(chan error, 1)
	go func() {
		_, err := ensure(ctx, Config{Dir: dir, Progress: w}, testRecipe(1), tinyBuild)
		result <- err
	}()
	said := make([]byte, 100)
	n, _ := r.Read(said)
	if !strings.Contains(string(said[:n]), "another process") {
		t.Errorf("said %q", said[:n])
	}
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestAFailedBuildLeavesNothingAndTheNextOneWorks(t *testing.T) {
	cfg := Config{Dir: t.TempDir()}
	_, err := ensure(t.Context(), cfg, testRecipe(1), func(_ context.Context, _ recipe, dir, _ string, _ *progress) error {
		return errors.Join(errors.New("no network"), os.WriteFile(filepath.Join(dir, "half"), nil, 0o644))
	})
	if err == nil || !strings.Contains(err.Error(), "no network") {
		t.Fatalf("got %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(cfg.Dir, ".tmp-*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
	if _, err := ensure(t.Context(), cfg, testRecipe(1), tinyBuild); err != nil {
		t.Error(err)
	}
}

func TestWhatAKilledBuildLeftIsRemoved(t *testing.T) {
	cfg := Config{Dir: t.TempDir()}
	left := filepath.Join(cfg.Dir, ".tmp-123", rootfsName)
	if err := os.MkdirAll(left, 0o755); err != nil {
		t.Fatal(err)
	}
	if builds, err := Load(cfg.Dir); err != nil || len(builds) != 0 {
		t.Errorf("Load sees a build in the making: %v, %v", builds, err)
	}
	if _, err := ensure(t.Context(), cfg, testRecipe(1), tinyBuild); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there", left)
	}
}

func TestVerifyNoticesEveryKindOfChange(t *testing.T) {
	for name, change := range map[string]func(root string) error{
		"content":    func(root string) error { return os.WriteFile(filepath.Join(root, "var/lib/dpkg/status"), nil, 0o644) },
		"mode":       func(root string) error { return os.Chmod(filepath.Join(root, "var"), 0o700) },
		"time":       func(root string) error { return os.Chtimes(filepath.Join(root, "var"), time.Time{}, time.Unix(1, 0)) },
		"a new file": func(root string) error { return os.WriteFile(filepath.Join(root, "new"), nil, 0o644) },
		"a new link": func(root string) error { return os.Symlink("/", filepath.Join(root, "new")) },
		"a deletion": func(root string) error { return os.Remove(filepath.Join(root, "var/lib/dpkg/status")) },
	} {
		t.Run(name, func(t *testing.T) {
			b, err := ensure(t.Context(), Config{Dir: t.TempDir()}, testRecipe(1), tinyBuild)
			if err != nil {
				t.Fatal(err)
			}
			if err := Verify(t.Context(), b); err != nil {
				t.Fatalf("before the change: %v", err)
			}
			if err := change(b.RootFS); err != nil {
				t.Fatal(err)
			}
			if err := Verify(t.Context(), b); err == nil {
				t.Error("not noticed")
			}
		})
	}
}

func TestABrokenManifestSaysWhatToDo(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "abc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"", "{", `{"id":"other"}`, "\x00"} {
		if err := os.WriteFile(filepath.Join(dir, "abc", manifestName), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), "remove "+dir) {
			t.Errorf("manifest %q: %v", text, err)
		}
	}
}

func TestTheHostsAuthoritiesArePartOfTheRecipe(t *testing.T) {
	dir := t.TempDir()
	id := func(trust bool) string {
		r, err := baseRecipe(trust, dir)
		if err != nil {
			t.Fatal(err)
		}
		return r.id()
	}
	without := id(true)
	if without != id(false) {
		t.Error("a host without authorities of its own has another recipe when they are trusted")
	}
	if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "wrenn-ca-0a1b.crt"), []byte("the platform's own"), 0o644); err != nil {
		t.Fatal(err)
	}
	if id(true) != without {
		t.Error("the platform's own authority changes the recipe")
	}
	for _, name := range []string{"sub/a.crt", "not-a-certificate.txt"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("one"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	one := id(true)
	if one == without || id(false) != without {
		t.Error("an added authority does not change the recipe exactly when it is trusted")
	}
	if err := os.WriteFile(filepath.Join(dir, "sub/a.crt"), []byte("two"), 0o644); err != nil {
		t.Fatal(err)
	}
	if id(true) == one {
		t.Error("a changed authority does not change the recipe")
	}
	if r, err := baseRecipe(true, filepath.Join(dir, "none")); err != nil || r.id() != without {
		t.Errorf("no directory: %v", err)
	}
}

func TestIDsHaveTheFormThatClientsExpect(t *testing.T) {
	if id := IDOf("base"); !regexp.MustCompile(`^[a-z0-9]{20}$`).MatchString(id) || id != IDOf("base") || id == IDOf("other") {
		t.Errorf("IDOf: %q", id)
	}
	r, err := baseRecipe(false, "")
	if err != nil || !regexp.MustCompile(`^[0-9a-f]{20}$`).MatchString(r.id()) {
		t.Errorf("build id %q, %v", r.id(), err)
	}
}

func TestProgressCountsPackages(t *testing.T) {
	var out bytes.Buffer
	p := newProgress(&out)
	p.begin("bootstrapping")
	feed := func(read func(string), lines ...string) string {
		out.Reset()
		for _, l := range lines {
			p.printed = time.Time{} // as if the pause were over
			read(l)
		}
		return out.String()
	}
	if got := feed(p.debootstrapLine, "I: Retrieving a 1", "I: Validating a 1", "W: odd", "I: Retrieving b 2"); !strings.Contains(got, "2 packages downloaded") {
		t.Errorf("got %q", got)
	}
	if got := feed(p.debootstrapLine, "I: Unpacking the base system...", "I: Unpacking a..."); !strings.Contains(got, "1 of 2 packages unpacked") {
		t.Errorf("got %q", got)
	}
	p.begin("installing")
	if got := feed(p.aptLine, "dlstatus:1:0.5:Retrieving file 3 of 459", "nonsense", "pmstatus:x:1.0:Unpacking x (amd64)", "pmstatus:"); !strings.Contains(got, "1 of 459 packages unpacked") {
		t.Errorf("got %q", got)
	}
}

// A step that has forked into the background must not outlive the step, neither
// when it ends nor when it is cancelled.
func TestAStepTakesEverythingThatItStartedWithIt(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: steps run in namespaces of their own")
	}
	// The background process holds the write end of a pipe: end of file on the
	// other end says that it is gone.
	for _, cancelled := range []bool{false, true} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		script := "mount -t tmpfs none /mnt; sleep 1000 >/dev/null 2>&1 & echo started"
		if cancelled {
			script += "; wait"
		}
		cmd := exec.Command("/bin/sh", "-c", script)
		cmd.ExtraFiles = []*os.File{w}
		cmd.SysProcAttr = &syscall.SysProcAttr{}
		ctx, cancel := context.WithCancel(t.Context())
		err = runStep(ctx, cmd, io.Discard, func(line string) {
			if cancelled {
				cancel()
			}
		}, nil)
		w.Close()
		cancel()
		if cancelled != errors.Is(err, context.Canceled) {
			t.Errorf("cancelled %v: %v", cancelled, err)
		}
		if err := r.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("cancelled %v: what the step started is still there: %v", cancelled, err)
		}
		if mounts, _ := os.ReadFile("/proc/self/mountinfo"); bytes.Contains(mounts, []byte(" /mnt ")) {
			t.Error("the step's mount is on the host")
		}
	}
}

// The child of this test is this test once more; it runs a step and is killed.
func TestAKilledBuildTakesItsStepsWithIt(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: steps run in namespaces of their own")
	}
	if os.Getenv("WRENN_TEST_STEP") != "" {
		cmd := exec.Command("/bin/sh", "-c", "sleep 1000 & echo started >&3; wait")
		cmd.ExtraFiles = []*os.File{os.NewFile(3, "pipe")}
		cmd.SysProcAttr = &syscall.SysProcAttr{}
		_ = runStep(context.Background(), cmd, io.Discard, nil, nil)
		return
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	child := exec.Command(os.Args[0], "-test.run=^TestAKilledBuildTakesItsStepsWithIt$")
	child.Env = append(os.Environ(), "WRENN_TEST_STEP=1")
	child.ExtraFiles = []*os.File{w}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := r.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(r, make([]byte, len("started\n"))); err != nil {
		t.Fatalf("the step did not start: %v", err)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // killed, as it should be
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the step outlived who ran it: %v", err)
	}
}

func TestAFailingStepShowsItsLastWords(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: steps run in namespaces of their own")
	}
	var log bytes.Buffer
	cmd := exec.Command("/bin/sh", "-c", "echo first; seq 20; echo no such mirror >&2; exit 3")
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	err := runStep(t.Context(), cmd, &log, nil, nil)
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "no such mirror") || strings.Contains(err.Error(), "first") {
		t.Errorf("got %v", err)
	}
	if !strings.HasPrefix(log.String(), "first\n1\n") {
		t.Errorf("log %q", log.String())
	}
}

// debootstrap's own chroot parts its target's name at spaces.
func TestABuildInADirectoryOfAnyNameGivesDebootstrapAPlainOne(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: steps run in namespaces of their own")
	}
	dir, programs := filepath.Join(t.TempDir(), "a, b:c%d"), t.TempDir()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	const script = "#!/bin/sh\nfor target; do :; done\nmkdir $target\necho as it was given > $target/said\n"
	if err := os.WriteFile(filepath.Join(programs, "debootstrap"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", programs+":"+os.Getenv("PATH"))
	// It ends behind that: there is no system in the tree.
	if err := build(t.Context(), testRecipe(1), dir, filepath.Join(dir, "log"), newProgress(nil)); err == nil {
		t.Error("the build is complete")
	}
	if _, err := os.Stat(filepath.Join(dir, rootfsName, "said")); err != nil {
		t.Error(err)
	}
}
