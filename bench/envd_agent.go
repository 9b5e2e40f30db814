package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

// envdAgent is a guest agent that runs bare on this machine.
type envdAgent struct {
	*child
	wire *wire
}

// startEnvd runs the agent; took is from fork to its first answer.
func startEnvd(ctx context.Context, binary, dir string) (_ *envdAgent, took time.Duration, err error) {
	address, err := freeAddress(ctx)
	if err != nil {
		return nil, 0, err
	}
	terminate := func(cmd *exec.Cmd) error { return cmd.Process.Signal(syscall.SIGTERM) }
	a := &envdAgent{child: newChild(ctx, terminate, binary, "-listen", address), wire: newWire(address)}
	a.cmd.Dir = dir
	a.cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	begin := time.Now()
	if err := a.start(); err != nil {
		return nil, 0, fmt.Errorf("start agent: %w", err)
	}
	retry := time.NewTicker(200 * time.Microsecond)
	defer retry.Stop()
	for {
		err := a.wire.health(ctx)
		if err == nil {
			return a, time.Since(begin), nil
		}
		select {
		case <-retry.C:
		case <-a.ended:
			return nil, 0, fmt.Errorf("agent ended before it answered: %w", a.err)
		case <-time.After(10*time.Second - time.Since(begin)):
			return nil, 0, errors.Join(fmt.Errorf("agent does not answer: %w", err), a.stop())
		}
	}
}

func (a *envdAgent) stop() error {
	a.wire.http.CloseIdleConnections()
	return a.child.stop()
}

// freeAddress is one on the loopback interface that nobody listens on.
func freeAddress(ctx context.Context) (string, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("find free port: %w", err)
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// envdStatus is what the kernel says of the agent; memory is in bytes.
type envdStatus struct {
	rss, peak    int64
	threads, fds int
}

func (a *envdAgent) status() (envdStatus, error) {
	var s envdStatus
	dir := "/proc/" + strconv.Itoa(a.cmd.Process.Pid)
	text, err := os.ReadFile(dir + "/status")
	if err != nil {
		return s, err
	}
	if s.rss, err = kib(text, "VmRSS:"); err != nil {
		return s, err
	}
	if s.peak, err = kib(text, "VmHWM:"); err != nil {
		return s, err
	}
	threads, err := os.ReadDir(dir + "/task")
	if err != nil {
		return s, err
	}
	fds, err := os.ReadDir(dir + "/fd")
	s.threads, s.fds = len(threads), len(fds)
	return s, err
}

// envdFloor is the HTTP server that the agent is compared with: another process,
// as the agent is one.
type envdFloor struct {
	*pipedChild
	url  string
	http *http.Client
	dial *atomic.Int32
}

func startEnvdFloor(ctx context.Context, command []string, dir string) (*envdFloor, error) {
	process, address, err := startPiped(ctx, nil, command, dir)
	if err != nil {
		return nil, fmt.Errorf("start floor: %w", err)
	}
	f := &envdFloor{pipedChild: process, url: "http://" + address}
	f.http, f.dial = loopbackClient()
	return f, nil
}

func (f *envdFloor) stop() error {
	f.http.CloseIdleConnections()
	_, err := f.pipedChild.stop()
	return err
}

// ServeEnvdFloor is the other end of what the agent is compared with, in a
// process of its own: the least that answers a request, and files of dir written
// and read with io.Copy. It prints its address to out, and ends when in does.
func ServeEnvdFloor(in io.Reader, out io.Writer, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("POST /files/{name}", func(w http.ResponseWriter, r *http.Request) {
		if err := floorUpload(root, r); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("GET /files/{name}", func(w http.ResponseWriter, r *http.Request) {
		if err := floorDownload(root, w, r); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	if _, err := fmt.Fprintln(out, l.Addr()); err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, in)
		server.Close()
	}()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func floorUpload(root *os.Root, r *http.Request) error {
	f, err := root.Create(r.PathValue("name"))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, r.Body); err != nil {
		return err
	}
	if r.URL.Query().Has("sync") {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	return f.Close()
}

func floorDownload(root *os.Root, w http.ResponseWriter, r *http.Request) error {
	f, err := root.Open(r.PathValue("name"))
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	// With the length known io.Copy has the kernel send the file.
	w.Header().Set("Content-Length", strconv.FormatInt(info.Size(), 10))
	_, err = io.Copy(w, f)
	return err
}
