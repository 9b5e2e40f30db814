package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
)

// startMachines starts a platform whose sandboxes are virtual machines.
func startMachines(t *testing.T, flags ...string) *platform {
	t.Helper()
	p := newPlatform(t, append([]string{"--runtime", "qemu"}, flags...)...)
	// Kept between runs, as templates are.
	kernels := filepath.Join(filepath.Dir(suite.data), "kernels")
	if _, err := kernel.Install(t.Context(), kernels, kernel.Options{}); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(kernels, filepath.Join(p.dir, "kernels")); err != nil {
		t.Fatal(err)
	}
	p.start()
	return p
}

func TestVirtualMachines(t *testing.T) {
	p := startMachines(t, "--compress-after", "5s")
	t.Run("a sandbox has a kernel of its own", func(t *testing.T) {
		b := p.create(nil)
		if got := b.run("uname -r"); !strings.Contains(got, "cloud-amd64") {
			t.Errorf("its kernel is %s", got)
		}
		if got, want := b.run("hostname"), b.id+"\n"; got != want {
			t.Errorf("its name is %q, want %q", got, want)
		}
		if got := b.run("nproc; stat -f -c %T /"); got != "2\next2/ext3\n" {
			t.Errorf("it has %q", got)
		}
		b.kill()
	})
	t.Run("a counter in memory and on disk goes on after a pause", func(t *testing.T) {
		b := p.create(nil)
		b.counter(8000)
		b.run("echo 1 > /root/disk")
		for i := range 12 {
			before := b.count(8000)
			b.pause()
			layers, _ := filepath.Glob(filepath.Join(p.dir, "agent", "sandboxes", b.id, "image", "memory-*.layer"))
			if n := len(layers); n < 1 || n > 11 {
				t.Errorf("after %d pauses its memory has %d layers", i+1, n)
			}
			b.resume()
			if got := b.count(8000); got != before+1 {
				t.Errorf("the counter went from %d to %d", before, got)
			}
			if got, want := b.run("n=$(cat /root/disk); echo $((n+1)) | tee /root/disk"), fmt.Sprintf("%d\n", i+2); got != want {
				t.Errorf("the one on the disk is %q, want %q", got, want)
			}
		}
		b.kill()
	})
	t.Run("forks go on each by itself", func(t *testing.T) { forksGoOn(t, p) })
	t.Run("connections of before a pause are over", func(t *testing.T) { connectionsOfBeforeAreOver(t, p) })
	t.Run("a sandbox goes on after its memory was compressed", func(t *testing.T) {
		b := p.create(nil)
		b.counter(8000)
		b.run("head -c 20000000 /dev/urandom | base64 > /dev/shm/data")
		want := b.run("sha256sum /dev/shm/data")
		for range 2 {
			before := b.count(8000)
			b.pause()
			image := filepath.Join(p.dir, "agent", "sandboxes", b.id, "image")
			eventually(t, time.Minute, "the image is compressed", func() error {
				small, _ := filepath.Glob(filepath.Join(image, "memory-*.layer.zst"))
				left, _ := filepath.Glob(filepath.Join(filepath.Dir(image), ".small-*"))
				if len(small) == 0 || len(left) > 0 {
					return fmt.Errorf("it has %v, and beside it are %v", small, left)
				}
				return nil
			})
			b.resume()
			if got := b.count(8000); got != before+1 {
				t.Errorf("the counter went from %d to %d", before, got)
			}
			if got := b.run("sha256sum /dev/shm/data"); got != want {
				t.Errorf("a file in memory is %q, was %q", got, want)
			}
		}
		b.kill()
	})
	t.Run("sandboxes outlive a killed platform", func(t *testing.T) {
		b := p.create(nil)
		b.counter(8000)
		before := b.count(8000)
		p.end(syscall.SIGKILL)
		p.start()
		if got := b.count(8000); got != before+1 {
			t.Errorf("the counter went from %d to %d", before, got)
		}
		b.kill()
	})
	t.Run("no other runtime takes them for lost", func(t *testing.T) { otherRuntimesStayAway(t, p) })
	t.Run("a paused sandbox keeps its kernel when there is another", func(t *testing.T) { keepsItsKernel(t, p) })
	t.Run("what no monitor loads any more starts from its disk", func(t *testing.T) {
		b := p.create(nil)
		b.run("echo 7 > /root/kept; sync")
		b.pause()
		image := filepath.Join(p.dir, "agent", "sandboxes", b.id, "image")
		// Of the same length: each knows the size of the other.
		for _, name := range []string{"manifest.json", "machine.json"} {
			path := filepath.Join(image, name)
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, regexp.MustCompile(`ersion":"[0-9]`).ReplaceAll(data, []byte(`ersion":"0`)), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if status, answer := p.api("POST", "/sandboxes/"+b.id+"/connect", map[string]any{"timeout": 300}); status != 409 || !strings.Contains(string(answer), "--cold") {
			t.Errorf("resume: %d %s", status, answer)
		}
		b.do("POST", "/connect", map[string]any{"timeout": 300, "memory": false}, 201)
		if got := b.run("cat /root/kept"); got != "7\n" {
			t.Errorf("its disk has %q", got)
		}
		b.kill()
	})
	t.Run("a paused sandbox survives a reboot", func(t *testing.T) { pausedSurvivesReboot(t, p) })
}

// otherRuntimesStayAway starts the platform again without the runtime of what is
// there, and with another.
func otherRuntimesStayAway(t *testing.T, p *platform) {
	running, paused := p.create(nil), p.create(nil)
	running.counter(8000)
	before := running.count(8000)
	paused.run("echo 7 > /root/kept")
	paused.pause()
	p.end(syscall.SIGTERM)
	refuses := func() {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		out, err := exec.CommandContext(ctx, suite.bin, "up", "--data", p.dir, "--listen", p.listen, "--runtime", "gvisor").CombinedOutput()
		if err == nil || !strings.Contains(string(out), "only --runtime qemu can go on with") {
			t.Fatalf("up --runtime gvisor: %v\n%s", err, out)
		}
	}
	refuses()
	flags := p.flags
	defer func() { p.flags = flags }()
	p.flags = nil
	p.start()
	if got := running.count(8000); got != before+1 {
		t.Errorf("the counter went from %d to %d", before, got)
	}
	p.end(syscall.SIGTERM)
	if out, err := exec.Command(suite.bin, "down", "--data", p.dir).CombinedOutput(); err != nil {
		t.Fatalf("wrenn down: %v\n%s", err, out)
	}
	refuses()
	p.start()
	paused.resume()
	if got := paused.run("cat /root/kept"); got != "7\n" {
		t.Errorf("the paused one has %q", got)
	}
	paused.kill()
	p.end(syscall.SIGTERM)
	p.flags = flags
	p.start()
}

// keepsItsKernel makes another kernel the current one while a sandbox is paused.
func keepsItsKernel(t *testing.T, p *platform) {
	b := p.create(nil)
	b.counter(8000)
	before := b.count(8000)
	b.pause()
	p.end(syscall.SIGTERM)

	kernels := filepath.Join(p.dir, "kernels")
	shared, err := os.Readlink(kernels)
	if err != nil {
		t.Fatal(err)
	}
	current, err := os.Readlink(filepath.Join(shared, "current"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(kernels); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(kernels, current+"-other")
	if err := os.CopyFS(other, os.DirFS(filepath.Join(shared, current))); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Base(other), filepath.Join(kernels, "current")); err != nil {
		t.Fatal(err)
	}
	defer func() {
		p.end(syscall.SIGTERM)
		if err := errors.Join(os.RemoveAll(kernels), os.Symlink(shared, kernels)); err != nil {
			t.Fatal(err)
		}
		p.start()
	}()
	p.start()
	b.resume()
	if got := b.count(8000); got != before+1 {
		t.Errorf("the counter went from %d to %d", before, got)
	}
	b.kill()
}

// TestClientsUseVirtualMachines runs the suites of E2B's SDKs where the sandboxes are
// virtual machines.
func TestClientsUseVirtualMachines(t *testing.T) {
	p := startMachines(t)
	testdata, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	p.create(nil).kill() // the first waits for the template's image
	env := p.environ("MODE=plain", "TESTDATA="+testdata, "OWN_KERNEL=1", "SLOWER=4")
	for name, command := range map[string]func(*testing.T, string) *exec.Cmd{"js": jsSuite, "python": pythonSuite} {
		t.Run(name, func(t *testing.T) {
			report := filepath.Join(t.TempDir(), "report.xml")
			cmd := command(t, report)
			cmd.Env = append(env, cmd.Env...)
			runSuite(t, cmd, report)
		})
	}
}
