package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"encoding/xml"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestClients runs the suites of E2B's JavaScript and Python SDKs, each in both
// ways that a client can be told where the platform is.
func TestClients(t *testing.T) {
	if suite.skip != "" {
		t.Skip(suite.skip)
	}
	for _, mode := range []string{"plain", "tls"} {
		t.Run(mode, func(t *testing.T) {
			p, env := clientPlatform(t, mode)
			for name, command := range map[string]func(*testing.T, string) *exec.Cmd{"js": jsSuite, "python": pythonSuite} {
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					report := filepath.Join(t.TempDir(), "report.xml")
					cmd := command(t, report)
					cmd.Env = append(env, cmd.Env...)
					runSuite(t, cmd, report)
				})
			}
			t.Cleanup(func() {
				if ids := p.running(); len(ids) > 0 {
					t.Errorf("the suites left sandboxes: %v", ids)
				}
			})
		})
	}
}

// clientPlatform starts a platform and returns the environment that tells
// clients of it.
func clientPlatform(t *testing.T, mode string) (*platform, []string) {
	t.Helper()
	testdata, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	if mode == "plain" {
		p := startPlatform(t)
		return p, p.environ("MODE=plain", "TESTDATA="+testdata)
	}
	if addrs, err := net.LookupHost("49983-x.e2b.localhost"); err != nil || len(addrs) == 0 {
		t.Skipf("domain mode needs names below .localhost to resolve (apt-get install libnss-myhostname): %v", err)
	}
	dir := t.TempDir()
	authority, err := writeCertificates(dir, "e2b.localhost", "*.e2b.localhost")
	if err != nil {
		t.Fatal(err)
	}
	domain := fmt.Sprintf("e2b.localhost:%d", freePort(t))
	p := startPlatform(t, "--domain", domain, "--tls-listen", strings.TrimPrefix(domain, "e2b."),
		"--tls-cert", filepath.Join(dir, "leaf.pem"), "--tls-key", filepath.Join(dir, "leaf.key"))
	env := []string{"MODE=tls", "TESTDATA=" + testdata, "E2B_DOMAIN=" + domain, "E2B_API_KEY=" + p.key,
		"NODE_EXTRA_CA_CERTS=" + authority, "SSL_CERT_FILE=" + authority, "SSL_CERT_DIR="}
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "E2B_") {
			env = append([]string{kv}, env...) // the later of two wins
		}
	}
	return p, env
}

func jsSuite(t *testing.T, report string) *exec.Cmd {
	dir, node := installJS(t)
	tests, err := filepath.Glob(filepath.Join(dir, "*.test.mjs"))
	if err != nil || len(tests) == 0 {
		t.Fatalf("no tests in %s: %v", dir, err)
	}
	cmd := exec.Command(node, append([]string{"--test", "--test-concurrency=2", "--test-timeout=240000",
		"--test-reporter=spec", "--test-reporter-destination=stdout",
		"--test-reporter=junit", "--test-reporter-destination=" + report}, tests...)...)
	cmd.Dir = dir
	return cmd
}

func pythonSuite(t *testing.T, report string) *exec.Cmd {
	python := installPython(t)
	cmd := exec.Command(python, "-m", "pytest", "-v", "--tb=short", "--junitxml="+report, ".")
	cmd.Dir = "python"
	cmd.Env = []string{"PYTHONDONTWRITEBYTECODE=1"}
	return cmd
}

// suiteLimit ends a suite that hangs.
const suiteLimit = 5 * time.Minute

// runSuite runs a suite and gives each of its cases a subtest with its outcome.
func runSuite(t *testing.T, cmd *exec.Cmd, report string) {
	t.Helper()
	var out lockedBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), suiteLimit)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	err := cmd.Wait()
	stop()

	cases, parseErr := readReport(report)
	if parseErr != nil {
		t.Fatalf("suite: %v, report: %v\n%s", err, parseErr, out.String())
	}
	failed := 0
	for _, c := range cases {
		t.Run(strings.ReplaceAll(c.name, "/", "∕"), func(t *testing.T) {
			switch {
			case c.failure != "":
				failed++
				t.Error(c.failure)
			case c.skipped:
				t.Skip(c.reason)
			}
		})
	}
	if err != nil && failed == 0 {
		t.Errorf("suite: %v", err)
	}
	if t.Failed() {
		t.Logf("output of the suite:\n%s", out.String())
	}
}

type caseResult struct {
	name, failure, reason string
	skipped               bool
}

// readReport reads a report in JUnit's format, in which suites nest.
func readReport(path string) ([]caseResult, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	type outcome struct {
		Message string `xml:"message,attr"`
		Text    string `xml:",chardata"`
	}
	type node struct {
		Name    string   `xml:"name,attr"`
		Failure *outcome `xml:"failure"`
		Error   *outcome `xml:"error"`
		Skipped *outcome `xml:"skipped"`
	}
	var cases []caseResult
	var suites []string
	d := xml.NewDecoder(strings.NewReader(string(data)))
	for {
		token, err := d.Token()
		if err != nil {
			if len(cases) == 0 {
				return nil, fmt.Errorf("report has no cases: %w", err)
			}
			return cases, nil
		}
		switch e := token.(type) {
		case xml.StartElement:
			if e.Name.Local != "testcase" {
				name := ""
				for _, a := range e.Attr {
					if a.Name.Local == "name" && a.Value != "pytest" && a.Value != "pytest tests" {
						name = a.Value
					}
				}
				suites = append(suites, name)
				continue
			}
			var n node
			if err := d.DecodeElement(&n, &e); err != nil {
				return nil, err
			}
			c := caseResult{name: strings.TrimSpace(strings.Join(suites, " ") + " " + n.Name)}
			for _, o := range []*outcome{n.Failure, n.Error} {
				if o != nil {
					c.failure += o.Message + "\n" + o.Text
				}
			}
			if n.Skipped != nil {
				c.skipped, c.reason = true, n.Skipped.Message
			}
			cases = append(cases, c)
		case xml.EndElement:
			suites = suites[:len(suites)-1]
		}
	}
}

// writeCertificates makes a certificate authority and a server certificate that
// it signed, as leaf.pem and leaf.key, and returns the authority's path.
func writeCertificates(dir string, names ...string) (string, error) {
	caKey, err1 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	leafKey, err2 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err := errors.Join(err1, err2); err != nil {
		return "", err
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Wrenn test authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	caDER, err1 := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	leafDER, err2 := x509.CreateCertificate(rand.Reader, leaf, ca, leafKey.Public(), caKey)
	keyDER, err3 := x509.MarshalPKCS8PrivateKey(leafKey)
	if err := errors.Join(err1, err2, err3); err != nil {
		return "", err
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	block := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	return path("ca.pem"), errors.Join(
		os.WriteFile(path("ca.pem"), block("CERTIFICATE", caDER), 0o644),
		os.WriteFile(path("leaf.pem"), block("CERTIFICATE", leafDER), 0o644),
		os.WriteFile(path("leaf.key"), block("PRIVATE KEY", keyDER), 0o600),
	)
}
