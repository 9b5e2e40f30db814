package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"time"
)

// parentFD is the descriptor on which a platform started in the background
// tells its parent how the start goes: lines of progress, then a verdict.
const (
	parentFD  = 3
	parentEnv = "WRENN_PARENT_PIPE"
	verdictOK = "\x00ready"
	verdictNo = "\x00failed "
)

// parentLink is the child's end; its methods do nothing when there is no parent.
type parentLink struct{ pipe *os.File }

func parentPipe() *parentLink {
	if os.Getenv(parentEnv) == "" {
		return &parentLink{}
	}
	os.Unsetenv(parentEnv)
	syscall.CloseOnExec(parentFD)
	return &parentLink{os.NewFile(parentFD, "parent")}
}

func (l *parentLink) progress(otherwise io.Writer) io.Writer {
	if l.pipe == nil {
		return otherwise
	}
	return l.pipe
}

func (l *parentLink) ready() { l.verdict(verdictOK) }
func (l *parentLink) fail(err error) {
	l.verdict(verdictNo + strings.ReplaceAll(err.Error(), "\n", "; "))
}

func (l *parentLink) verdict(line string) {
	if l.pipe == nil {
		return
	}
	// The parent may be gone; then there is nobody to tell.
	_, _ = io.WriteString(l.pipe, line+"\n")
	_ = l.pipe.Close()
	l.pipe = nil
}

// upDetached makes sure that the platform asked for runs in the background, and
// checks that it works. One that runs another build of wrenn or other options
// is replaced; its sandboxes go on.
func upDetached(ctx context.Context, dir dataDir, opts upOptions, out io.Writer) error {
	if os.Geteuid() != 0 {
		return errors.New("wrenn up makes network namespaces and cgroups and needs root: run it with sudo")
	}
	for waiting := false; ; {
		running, ok, err := findRunning(ctx, dir)
		switch {
		case err != nil:
			return err
		case !ok:
			err := spawnPlatform(ctx, dir, out)
			if err == nil {
				return selfCheck(ctx, dir, out)
			}
			if _, other, _ := findRunning(ctx, dir); !other {
				return fmt.Errorf("%w\nIts log is %s", err, dir.log())
			}
			// Another start was faster.
		case running.Program != programID() || !reflect.DeepEqual(running.Options, opts):
			fmt.Fprintln(out, "Replacing the running platform: it is another build or has other options. Its sandboxes go on.")
			stopCtx, cancel := context.WithTimeout(ctx, stopLimit)
			_, err := stopRunning(stopCtx, dir, syscall.SIGTERM)
			cancel()
			if err != nil {
				return err
			}
		case running.Ready:
			return selfCheck(ctx, dir, out)
		default:
			if !waiting {
				fmt.Fprintf(out, "Waiting for the platform that is starting (process %d); its log is %s\n", running.PID, dir.log())
				waiting = true
			}
			select {
			case <-time.After(startPoll): // its lock file has no better way to tell
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
}

// startPoll is how often the start of a platform that another process started is
// looked at.
const startPoll = 50 * time.Millisecond

// spawnPlatform starts this program's `up` with the same flags less --detach, in
// a session of its own, and relays its progress until it is ready.
func spawnPlatform(ctx context.Context, dir dataDir, out io.Writer) error {
	logFile, err := openLog(dir.log())
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer logFile.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make pipe: %w", err)
	}
	defer r.Close()
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	var args []string
	for _, a := range os.Args[1:] {
		if a != "--detach" && !strings.HasPrefix(a, "--detach=") {
			args = append(args, a)
		}
	}
	cmd := exec.Command(self, args...)
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.Env = append(os.Environ(), parentEnv+"=1")
	cmd.ExtraFiles = []*os.File{w} // becomes parentFD
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("start platform: %w", err)
	}
	// Until it is ready, Ctrl-C here is meant for it too.
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	unhook := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(syscall.SIGINT) })
	defer unhook()

	lines := bufio.NewScanner(r)
	for lines.Scan() {
		line := lines.Text()
		switch {
		case line == verdictOK:
			return cmd.Process.Release()
		case strings.HasPrefix(line, verdictNo):
			_ = cmd.Wait()
			return errors.New(strings.TrimPrefix(line, verdictNo))
		default:
			fmt.Fprintln(out, line)
		}
	}
	return fmt.Errorf("the platform ended while it was starting: %w", cmp.Or(cmd.Wait(), errors.New("exit status 0")))
}

// maxLogSize is the size, in bytes, from which on a log is set aside at the next
// start. One earlier log is kept.
const maxLogSize = 64 << 20

// openLog opens the log to append to.
func openLog(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if fi, err := os.Stat(path); err == nil && fi.Size() > maxLogSize {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, err
		}
	}
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
}

// selfCheck runs a line of Python in a new sandbox and says how to go on.
func selfCheck(ctx context.Context, dir dataDir, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	begin := time.Now()
	output, creds, err := runPython(ctx, dir, `import platform, sys; print(f"Hello from Python {platform.python_version()} in a sandbox: 6 * 7 = {6 * 7}")`)
	if err != nil {
		return fmt.Errorf("the platform is up but its self-check failed: %w\nIts log is %s; `wrenn doctor` checks the host", err, dir.log())
	}
	flag := ""
	if string(dir) != defaultDataDir {
		flag = " --data " + string(dir)
	}
	fmt.Fprintf(out, `%s
(a new sandbox, made, used and gone in %d ms)

Wrenn is up.
  address   %s
  log       %s
  try       bin/wrenn run%s -- python3 -c 'print(6*7)'
  SDKs      eval "$(bin/wrenn env%s)"    then use the E2B SDK as it is
  stop      bin/wrenn down%s
`, strings.TrimSpace(output), time.Since(begin).Milliseconds(), creds.APIURL, dir.log(), flag, flag, flag)
	return nil
}
