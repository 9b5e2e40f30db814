package reserve

import (
	"os"
	"strings"
	"syscall"
	"testing"
)

func TestThreadsAreThereBeforeTheyAreNeeded(t *testing.T) {
	count := func() int {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		return len(tasks)
	}
	before := count()
	makeThreads(before + 10)
	if now := count(); now < before+10 {
		t.Errorf("%d threads, want %d at least", now, before+10)
	}
}

func TestTheProgramIsLockedInMemory(t *testing.T) {
	lockText()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(status), "VmLck:\t       0 kB") {
		t.Error("nothing is locked")
	}
}

func TestSignalsAreDropped(t *testing.T) {
	IgnoreSignals()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGSEGV, syscall.SIGUSR1, syscall.SIGPIPE} {
		if err := syscall.Kill(os.Getpid(), sig); err != nil {
			t.Error(err)
		}
	}
}
