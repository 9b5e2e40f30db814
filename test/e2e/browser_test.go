package e2e

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"testing"
)

// browse runs a script of js/ that drives headless Chromium, with its cases as
// subtests. It is given the addresses of applications in all their forms.
func (w *web) browse(t *testing.T, b *box, script string, applications map[string][]form) {
	t.Helper()
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("needs a browser: apt-get install chromium")
	}
	dir, node := installJS(t)
	addresses := map[string]map[string]string{}
	for name, forms := range applications {
		addresses[name] = map[string]string{}
		for _, f := range forms {
			addresses[name][f.name] = f.url
		}
	}
	encoded, err := json.Marshal(addresses)
	if err != nil {
		t.Fatal(err)
	}
	report := filepath.Join(t.TempDir(), "report.xml")
	cmd := exec.Command(node, "--test", "--test-timeout=120000",
		"--test-reporter=spec", "--test-reporter-destination=stdout",
		"--test-reporter=junit", "--test-reporter-destination="+report, script)
	cmd.Dir = dir
	cmd.Env = w.environ("CHROMIUM="+chromium, "CERTIFICATE="+w.certificate, "SANDBOX_ID="+b.id, "ADDRESSES="+string(encoded))
	runSuite(t, cmd, report)
}
