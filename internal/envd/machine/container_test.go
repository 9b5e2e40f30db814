package machine

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// inNamespace runs f where the hostname is name, and the thread's own.
func inNamespace(name string, f func()) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and the thread ends with the goroutine
		if unix.Gettid() == os.Getpid() {
			// Except the first one, whose namespace counts as the process's.
			defer runtime.UnlockOSThread()
			done <- inNamespace(name, f)
			return
		}
		err := unix.Unshare(unix.CLONE_NEWUTS)
		if err == nil {
			err = unix.Sethostname([]byte(name))
		}
		if err == nil {
			f()
		}
		done <- err
	}()
	return <-done
}

func TestAContainerIsNamedAfterItsSandboxUnlessItsUserChoseAName(t *testing.T) {
	const hosts = "127.0.0.1\tlocalhost\n10.0.0.1\tsandbox other\n# 169.254.0.21 sandbox\n"
	for name, test := range map[string]struct {
		named, now         string // by the engine at first, and since
		hostname, hosts    string // files
		wantName           string
		wantFile, wantHost string
	}{
		"first":                           {"sandbox", "sandbox", "sandbox\n", hosts + "169.254.0.21\tsandbox\n", "box1", "box1\n", hosts + "169.254.0.21\tbox1\n"},
		"again":                           {"box1", "box1", "box1\n", "x", "box1", "box1\n", "x"},
		"copy of another one":             {"box0", "box0", "box0\n", "169.254.0.21 box0", "box1", "box1\n", "169.254.0.21\tbox1\n"},
		"the engine has renamed it":       {"box0", "box1", "box0\n", "169.254.0.21 box0\n", "box1", "box1\n", "169.254.0.21\tbox1\n"},
		"booted from another one's files": {"sandbox", "sandbox", "box0\n", "169.254.0.21 box0\n", "box1", "box1\n", "169.254.0.21\tbox1\n"},
		"the user has chosen":             {"sandbox", "mine", "mine\n", "169.254.0.21 sandbox\n", "mine", "mine\n", "169.254.0.21 sandbox\n"},
		"the user has changed files only": {"sandbox", "sandbox", "mine\n", "1.2.3.4 sandbox s\n", "box1", "mine\n", "1.2.3.4 sandbox s\n"},
		"the loopback keeps its name":     {"localhost", "localhost", "localhost\n", "127.0.0.1 localhost\n", "box1", "box1\n", "127.0.0.1 localhost\n"},
	} {
		t.Run(name, func(t *testing.T) {
			err := inNamespace(test.now, func() {
				root := t.TempDir()
				os.Mkdir(filepath.Join(root, "etc"), 0o755)
				hostnameFile, hostsFile := filepath.Join(root, "etc/hostname"), filepath.Join(root, "etc/hosts")
				os.WriteFile(hostnameFile, []byte(test.hostname), 0o644)
				os.WriteFile(hostsFile, []byte(test.hosts), 0o644)
				c := &Container{root: root, named: test.named, once: "box0"}
				if err := c.Name("box1"); err != nil {
					t.Error(err)
				}
				if got, _ := os.Hostname(); got != test.wantName {
					t.Errorf("hostname is %q, want %q", got, test.wantName)
				}
				if got, _ := os.ReadFile(hostnameFile); string(got) != test.wantFile {
					t.Errorf("/etc/hostname is %q, want %q", got, test.wantFile)
				}
				if got, _ := os.ReadFile(hostsFile); string(got) != test.wantHost {
					t.Errorf("/etc/hosts is %q, want %q", got, test.wantHost)
				}
				os.RemoveAll(filepath.Join(root, "etc"))
				if err := c.Name("box2"); err != nil {
					t.Error("without files:", err)
				}
			})
			if err != nil {
				t.Skip("no namespace for names:", err)
			}
		})
	}
}

func TestAContainerWithTheHostsNameIsNotRenamed(t *testing.T) {
	namespace, err := os.Readlink("/proc/self/ns/uts")
	if err != nil {
		t.Skip(err)
	}
	if c, shared := NewContainer(""), namespace == "uts:[4026531838]"; (c == nil) != shared {
		t.Errorf("in namespace %s the container is %+v", namespace, c)
	}
}
