package settings

import (
	"net/netip"
	"os"
	"testing"
)

func TestIdentityWinsOverTheCreatorsVariablesAndIsKept(t *testing.T) {
	var s Settings
	if s.User() != "root" || s.Workdir() != "" || len(s.Env()) != 0 {
		t.Errorf("fresh settings are %q, %q, %v", s.User(), s.Workdir(), s.Env())
	}
	s.SetEnv(map[string]string{"A": "1", "E2B_SANDBOX_ID": "forged"})
	s.SetIdentity("id", "tpl")
	s.SetIdentity("", "") // a later request that names none
	env := s.Env()
	if env["A"] != "1" || env["E2B_SANDBOX_ID"] != "id" || env["WRENN_SANDBOX_ID"] != "id" || env["E2B_TEMPLATE_ID"] != "tpl" || env["E2B_SANDBOX"] != "true" {
		t.Errorf("got %v", env)
	}
	env["A"] = "changed"
	if s.Env()["A"] != "1" {
		t.Error("the caller's copy is not a copy")
	}
	dir := t.TempDir() + "/run"
	for range 2 { // after every resume
		if err := s.WriteIdentity(dir); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{
		"e2b/.E2B_SANDBOX": "true", "e2b/.E2B_SANDBOX_ID": "id", "e2b/.E2B_TEMPLATE_ID": "tpl",
		"wrenn/.WRENN_SANDBOX_ID": "id", "wrenn/.WRENN_TEMPLATE_ID": "tpl",
	} {
		if got, err := os.ReadFile(dir + "/" + name); err != nil || string(got) != want {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
	}
	s.SetEvents(netip.MustParseAddr("192.0.2.1"))
	s.SetEnv(nil)
	if env := s.Env(); env["E2B_EVENTS_ADDRESS"] != "http://192.0.2.1" || env["E2B_SANDBOX_ID"] != "id" || env["A"] != "" {
		t.Errorf("after a new environment: %v", env)
	}
	s.SetDefaults("user", "/w")
	s.SetDefaults("", "")
	if s.User() != "user" || s.Workdir() != "/w" {
		t.Errorf("defaults are %q, %q", s.User(), s.Workdir())
	}
}
