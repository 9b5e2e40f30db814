package rights

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"golang.org/x/sys/unix"
)

const helper = "RIGHTS_TEST_HELPER" // that a test is run again, to change its process

func TestWhatIsStartedLaterDoesNotGetWhatIsWithheld(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, whose programs have every right")
	}
	if os.Getenv(helper) == "" {
		// The race detector's runtime is in C, whose threads keep their rights.
		binary := filepath.Join(t.TempDir(), "rights.test")
		build := exec.Command("go", "test", "-c", "-o", binary, ".")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build without C: %v\n%s", err, out)
		}
		cmd := exec.Command(binary, "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), helper+"=1")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	if err := Withhold(unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("cat", "/proc/self/status").Output()
	if err != nil {
		t.Fatal(err)
	}
	sets := regexp.MustCompile(`(?m)^Cap\w+:\s+(\w+)$`).FindAllStringSubmatch(string(out), -1)
	if len(sets) == 0 {
		t.Fatalf("no capabilities in %s", out)
	}
	for _, set := range sets {
		var bits uint64
		if _, err := fmt.Sscanf(set[1], "%x", &bits); err != nil || bits&(1<<unix.CAP_NET_ADMIN|1<<unix.CAP_SYS_ADMIN) != 0 {
			t.Errorf("a program that root runs may: %s (%v)", set[0], err)
		}
	}
}
