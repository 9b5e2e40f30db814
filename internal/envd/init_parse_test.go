package envd

import (
	"bytes"
	"encoding/json"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestABadInitRequestIsRefusedAsAWhole(t *testing.T) {
	for name, body := range map[string]string{
		"not JSON":                     `{`,
		"a list":                       `[]`,
		"a number":                     `7`,
		"rubbish behind":               `{} {}`,
		"a token that is a number":     `{"accessToken":7}`,
		"variables that are a list":    `{"envVars":["A=1"]}`,
		"a variable that is a number":  `{"envVars":{"A":1}}`,
		"a variable without a name":    `{"envVars":{"":"1"}}`,
		"a name with =":                `{"envVars":{"A=B":"1"}}`,
		"a name with NUL":              `{"envVars":{"A\u0000":"1"}}`,
		"a value with NUL":             `{"envVars":{"A":"1\u0000"}}`,
		"a time that is a number":      `{"timestamp":1700000000}`,
		"a time before all":            `{"timestamp":"0001-01-01T00:00:00Z"}`,
		"a time beyond all":            `{"timestamp":"9999-01-01T00:00:00Z"}`,
		"an id of two lines":           `{"sandboxID":"a\nb"}`,
		"an id that is too long":       `{"templateID":"` + strings.Repeat("x", 257) + `"}`,
		"a user with a colon":          `{"defaultUser":"root:x"}`,
		"a directory with NUL":         `{"defaultWorkdir":"/\u0000"}`,
		"entropy that is not base64":   `{"entropy":"%%%"}`,
		"too much entropy":             `{"entropy":"` + strings.Repeat("AAAA", 2000) + `"}`,
		"authorities that are none":    `{"caBundle":"trust me"}`,
		"an events address with words": `{"hyperloopIP":"192.0.2.1\nevil"}`,
	} {
		if req, err := parseInit([]byte(body)); err == nil {
			t.Errorf("%s: taken as %+v", name, req)
		}
	}
	req, err := parseInit([]byte(`{"accessToken":"t","envVars":{"A.b-c":"ü\n"},"timestamp":"2026-01-02T03:04:05.6+01:00","defaultUser":"u","sandboxID":"i","lifecycleID":"3f2b-1","entropy":"AAEC","hyperloopIP":"192.0.2.1","volumeMounts":[{"path":"/x"}]}`))
	if err != nil || req.EnvVars["A.b-c"] != "ü\n" || !bytes.Equal(req.Entropy, []byte{0, 1, 2}) || req.events.String() != "192.0.2.1" {
		t.Errorf("a good one: %+v, %v", req, err)
	}
}

func FuzzParseInit(f *testing.F) {
	for _, s := range []string{``, `null`, `{}`, `{"accessToken":"t","envVars":{"A":"1"},"timestamp":"2026-01-02T03:04:05Z"}`, `{"envVars":{"=":"\u0000"}}`,
		`{"entropy":"AAEC","hyperloopIP":"::1%eth0"}`, `{"sandboxID":" ","SANDBOXID":"x"}`, `{"caBundle":"-----BEGIN CERTIFICATE-----"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		req, err := parseInit(body)
		if err != nil {
			return
		}
		for name, value := range req.EnvVars {
			// What the kernel would refuse, or take for another variable.
			if _, err := syscall.ByteSliceFromString(name + "=" + value); err != nil || name == "" || strings.Contains(name, "=") {
				t.Errorf("variable %q=%q", name, value)
			}
		}
		for _, id := range []string{req.SandboxID, req.TemplateID, req.LifecycleID} {
			if strings.ContainsAny(id, "\x00\n\r\t ") || len(id) > 256 {
				t.Errorf("id %q", id)
			}
		}
		if req.Timestamp != nil {
			if _, err := json.Marshal(req.Timestamp); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestTheClockIsSetOnlyWhenItIsOffAndIsTheSandboxsOwn(t *testing.T) {
	for _, tc := range []struct {
		name  string
		owner bool
		off   time.Duration // of what the host says, from now
		since time.Duration // that the request has been waiting
		want  bool
	}{
		{"right", true, 0, 0, false},
		{"a request's way behind", true, 20 * time.Millisecond, 0, false},
		{"behind", true, time.Second, 0, true},
		{"years behind", true, 10_000 * time.Hour, 0, true},
		{"a little ahead", true, -4 * time.Second, 0, false},
		{"far ahead", true, -10 * time.Second, 0, true},
		{"a request that waited is not old", true, -8 * time.Second, 8 * time.Second, false},
		{"somebody else's clock", false, time.Hour, 0, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := New(Config{})
			a.ownsMachine = tc.owner
			var set []time.Time
			a.setClock = func(to time.Time) error { set = append(set, to); return syscall.EPERM }
			now := time.Now()
			a.stepClock(now.Add(tc.off).Round(0), now.Add(-tc.since))
			if (len(set) > 0) != tc.want {
				t.Fatalf("set to %v", set)
			}
			if tc.want && (set[0].Sub(now) < tc.off || set[0].Sub(now) > tc.off+tc.since+time.Second) {
				t.Errorf("set to %v, %v from now", set[0], set[0].Sub(now))
			}
		})
	}
}
