package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/client/clienttest"
)

// TestMain lets the test binary be the program itself, under the name of wrenn.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"wrenn": func() { os.Exit(execute()) },
	})
}

// TestScripts runs testdata/script: the command line against a platform whose
// sandboxes are guest agents on this machine.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			p := clienttest.New(env.T().(testing.TB))
			env.Values["platform"] = p
			dir := filepath.Join(env.WorkDir, "data")
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
			env.Setenv("WRENN_DATA", dir)
			env.Setenv("URL", p.URL)
			return client.Credentials{APIURL: p.URL, APIKey: clienttest.APIKey}.Save(filepath.Join(dir, client.CredentialsFile))
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits":  exits,
			"json":   jsonFields,
			"gone":   gone,
			"setout": setOut,
			"asked":  asked,
		},
	})
}

// exits CODE CMD… runs a command and wants that exit code.
func exits(ts *testscript.TestScript, _ bool, args []string) {
	err := ts.Exec(args[1], args[2:]...)
	code := "0"
	if err != nil {
		_, code, _ = strings.Cut(err.Error(), "exit status ")
	}
	if code != args[0] {
		ts.Fatalf("exit code %q (%v), want %s", code, err, args[0])
	}
}

// json FIELD… wants stdout to be an object, or an array of objects, with exactly
// these fields.
func jsonFields(ts *testscript.TestScript, _ bool, want []string) {
	var objects []map[string]any
	text := ts.ReadFile("stdout")
	if !strings.HasPrefix(text, "[") {
		text = "[" + text + "]"
	}
	ts.Check(json.Unmarshal([]byte(text), &objects))
	for _, object := range objects {
		var got []string
		for field := range object {
			got = append(got, field)
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			ts.Fatalf("fields %v, want %v", got, want)
		}
	}
}

// gone wants no sandbox to be left, and at least one to have been.
func gone(ts *testscript.TestScript, _ bool, _ []string) {
	p := ts.Value("platform").(*clienttest.Platform)
	if left, killed := p.Running(), p.Killed(); len(left) > 0 || len(killed) == 0 {
		ts.Fatalf("left: %v, killed: %v", left, killed)
	}
}

// asked TEXT wants the control API to have been asked something with TEXT in it.
func asked(ts *testscript.TestScript, neg bool, args []string) {
	p := ts.Value("platform").(*clienttest.Platform)
	found := slices.ContainsFunc(p.Requests(), func(r string) bool { return strings.Contains(r, args[0]) })
	if found == neg {
		ts.Fatalf("asked: %s", strings.Join(p.Requests(), "\n"))
	}
}

// setout NAME [LENGTH] sets a variable to the first line of stdout, or to its beginning.
func setOut(ts *testscript.TestScript, _ bool, args []string) {
	line, _, _ := strings.Cut(ts.ReadFile("stdout"), "\n")
	if len(args) > 1 {
		var n int
		fmt.Sscan(args[1], &n)
		line = line[:n]
	}
	ts.Setenv(args[0], line)
}

func TestWordsSurviveTheShell(t *testing.T) {
	for _, word := range []string{"", "plain", "a b", "it's", `$(touch x) "q" \ ` + "`id`", "line\nbreak", "'"} {
		if got := shellWord(t, shellQuote(word)); got != word {
			t.Errorf("%q became %q", word, got)
		}
	}
}

func TestTextOfOthersDoesNotSteerTheTerminal(t *testing.T) {
	for in, want := range map[string]string{
		"plain":        "plain",
		"é ü 漢":        "é ü 漢",
		"\x1b[2Jx\r\n": `\x1b[2Jx\r\n`,
		`a\b"c`:        `a\b"c`,
		"\u202eabc":    `\u202eabc`,
	} {
		if got := printable(in); got != want {
			t.Errorf("%q is shown as %q, want %q", in, got, want)
		}
	}
}

func TestLocations(t *testing.T) {
	for arg, want := range map[string]location{
		"abc:/x":    {"abc", "/x"},
		"abc:":      {"abc", "."},
		"abc:x:y":   {"abc", "x:y"},
		"./abc:x":   {"", "./abc:x"},
		"/a:b":      {"", "/a:b"},
		"file":      {"", "file"},
		"-":         {"", "-"},
		":x":        {"", ":x"},
		"UPPER:x":   {"", "UPPER:x"},
		"abc:~/dir": {"abc", "~/dir"},
	} {
		if got := parseLocation(arg); got != want {
			t.Errorf("%s is %+v, want %+v", arg, got, want)
		}
	}
}
