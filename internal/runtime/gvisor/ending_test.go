package gvisor

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestAnEndingIsToldInWords(t *testing.T) {
	for _, test := range []struct {
		name, panic, log string
		status           unix.WaitStatus
		known            bool
		want             string
	}{
		{name: "status of init", status: 3 << 8, known: true, want: "guest agent exited with status 3"},
		{name: "signal to init", status: (128 + 11) << 8, known: true, want: "guest agent was killed (signal 11)"},
		{name: "signal to the engine", status: 9, known: true, want: "sandbox engine was killed (signal 9)"},
		{name: "nothing known", want: "sandbox engine ended"},
		{name: "crash", panic: "goroutine trace\npanic: watchdog\nmore\n", status: 2 << 8, known: true, want: "sandbox engine crashed: panic: watchdog"},
		{name: "log, nothing else", log: `{"msg":"first"}{"msg":"disk\n gone"}`, want: "sandbox engine failed: disk gone"},
		{name: "broken log", log: `{"msg":`, want: "sandbox engine ended"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, content := range map[string]string{panicFile: test.panic, logFile: test.log} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if got := ending(dir, test.status, test.known); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}
