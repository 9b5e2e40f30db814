package microvm

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/life"
)

// lateMonitor pauses its machine and answers too late.
type lateMonitor struct {
	Monitor
	paused bool
}

func (m *lateMonitor) Pause(ctx context.Context, _ Machine) error {
	m.paused = true
	<-ctx.Done()
	return ctx.Err()
}

func (m *lateMonitor) Resume(context.Context, Machine) error {
	m.paused = false
	return nil
}

func TestAMachineGoesOnAfterAPauseThatCameTooLate(t *testing.T) {
	monitor := &lateMonitor{}
	i := &instance{Instance: &life.Instance{}, rt: &Runtime{cfg: Config{Monitor: monitor, Log: slog.New(slog.DiscardHandler)}}}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, pause := range []bool{false, true} {
		err := i.Snapshot(ctx, runtime.Image{Dir: t.TempDir(), Kind: runtime.ImageMemory}, pause)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("the snapshot gives %v", err)
		}
		if monitor.paused {
			t.Errorf("with pause=%v the machine stands still", pause)
		}
	}
}

// TestConsolesThatAreNone puts in the place of the console what a monitor could that
// was taken over.
func TestConsolesThatAreNone(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("of the host"), 0o600); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for what, make := range map[string]func(path string) error{
		"link to a file":       func(path string) error { return os.Symlink(secret, path) },
		"link to a device":     func(path string) error { return os.Symlink("/dev/zero", path) },
		"link to another pipe": func(path string) error { return os.Symlink(fifo, path) },
		"file":                 func(path string) error { return os.WriteFile(path, []byte("text"), 0o600) },
		"directory":            func(path string) error { return os.Mkdir(path, 0o700) },
		"pipe of another user": func(path string) error { return errors.Join(unix.Mkfifo(path, 0o600), os.Chown(path, 4711, 4711)) },
	} {
		t.Run(what, func(t *testing.T) {
			m := Machine{Dir: t.TempDir(), UID: uint32(os.Getuid())}
			if err := errors.Join(os.Mkdir(m.Run(), 0o700), make(m.Console())); err != nil {
				t.Skip("cannot be made here: ", err)
			}
			if said := LastWords(m); said != "" {
				t.Errorf("the console says %q", said)
			}
			if f, err := OpenConsole(m); err == nil {
				f.Close()
				t.Error("it is opened")
			}
		})
	}
}

// TestAConsoleThatIsWrittenToWithoutEnd is left alone after a while.
func TestAConsoleThatIsWrittenToWithoutEnd(t *testing.T) {
	m := Machine{Dir: t.TempDir(), UID: uint32(os.Getuid())}
	if err := os.Mkdir(m.Run(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := makeConsole(m); err != nil {
		t.Fatal(err)
	}
	writer, err := os.OpenFile(m.Console(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := writer.WriteString("it begins"); err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		for text := []byte(strings.Repeat("x", 4096)); ; {
			if _, err := writer.Write(text); err != nil {
				return
			}
		}
	}()
	said := make(chan string)
	go func() { said <- LastWords(m) }()
	select {
	case text := <-said:
		if len(text) == 0 || len(text) > 4*consoleKept {
			t.Errorf("it says %d bytes", len(text))
		}
	case <-time.After(20 * time.Second):
		t.Error("it is read without end")
	}
	writer.Close()
	<-over
}

// TestOnlyPlainFilesAreOpened is about what lies where a monitor writes a file.
func TestOnlyPlainFilesAreOpened(t *testing.T) {
	dir := t.TempDir()
	pipe, link := filepath.Join(dir, "pipe"), filepath.Join(dir, "link")
	if err := errors.Join(unix.Mkfifo(pipe, 0o600), os.Symlink("/etc/passwd", link)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{pipe, link, dir} {
		result := make(chan error, 1)
		go func() {
			f, err := OpenPlain(path)
			if err == nil {
				f.Close()
			}
			result <- err
		}()
		select {
		case err := <-result:
			if err == nil {
				t.Errorf("%s is opened", path)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s holds up who opens it", path)
		}
	}
}
