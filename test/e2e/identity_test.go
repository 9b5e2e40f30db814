package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
)

func TestASandboxIsNamedAfterItselfAlsoAsACopy(t *testing.T) {
	p := startPlatform(t)
	b := p.create(nil)
	check := func(b *box) {
		t.Helper()
		const script = `hostname; cat /proc/sys/kernel/hostname /etc/hostname /run/wrenn/.WRENN_SANDBOX_ID; echo; getent ahostsv4 $(hostname) | grep -c 169.254.0.21; grep -vc -e localhost -e $(hostname) /etc/hosts`
		if got, want := b.try(script).stdout, fmt.Sprintf("%[1]s\n%[1]s\n%[1]s\n%[1]s\n3\n0\n", b.id); got != want {
			t.Errorf("the sandbox is named\n%swant\n%s", got, want)
		}
	}
	check(b)
	// With the right to name itself it could mount things, and more.
	if out := b.run("grep ^Cap /proc/self/status; hostname mine 2>&1 || echo refused; mount -t tmpfs none /mnt 2>&1 || echo refused"); strings.Count(out, "refused\n") != 2 {
		t.Errorf("programs have a right of the agent's:\n%s", out)
	}

	for _, memory := range []bool{true, false} {
		if status, answer := p.api("POST", "/sandboxes/"+b.id+"/pause", map[string]any{"memory": memory}); status != http.StatusNoContent {
			t.Fatalf("pause: %d %s", status, answer)
		}
		if status, answer := p.api("POST", "/sandboxes/"+b.id+"/connect", map[string]any{"timeout": 300}); status != http.StatusCreated {
			t.Fatalf("connect: %d %s", status, answer)
		}
		check(b)
	}

	status, answer := p.api("POST", "/sandboxes/"+b.id+"/fork", map[string]any{"count": 2})
	var forks []struct {
		Sandbox struct {
			SandboxID       string `json:"sandboxID"`
			EnvdAccessToken string `json:"envdAccessToken"`
		} `json:"sandbox"`
	}
	if err := json.Unmarshal(answer, &forks); err != nil || status != http.StatusCreated || len(forks) != 2 {
		t.Fatalf("fork: %d %s", status, answer)
	}
	for _, f := range forks {
		check(p.box(f.Sandbox.SandboxID, f.Sandbox.EnvdAccessToken))
	}
	check(b)
}
