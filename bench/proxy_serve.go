package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/wrenn/wrenn/internal/accesslog"
	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/server"
)

// nginx is a running nginx.
type nginx struct {
	*child
	address string
}

// startNginx runs nginx with what http returns for a free address in its http block.
func startNginx(ctx context.Context, dir, name, workers string, http func(address string) string) (*nginx, error) {
	path, err := exec.LookPath("nginx")
	if err != nil {
		// Not in every PATH, for it is a server.
		if path, err = exec.LookPath("/usr/sbin/nginx"); err != nil {
			return nil, errors.New("the proxy is measured beside nginx, which is not here: apt-get install nginx-light")
		}
	}
	address, err := freeAddress(ctx)
	if err != nil {
		return nil, err
	}
	user := ""
	if os.Geteuid() == 0 {
		user = "user root;"
	}
	conf := fmt.Sprintf(`daemon off; %s %s pid %[3]s/%[4]s.pid; error_log %[3]s/%[4]s.log;
worker_rlimit_nofile 16384;
events { worker_connections 8192; }
http {
	keepalive_requests 1000000000; sendfile on; tcp_nopush on;
	client_body_temp_path %[3]s/%[4]s-body; proxy_temp_path %[3]s/%[4]s-proxy;
	fastcgi_temp_path %[3]s/%[4]s-f; uwsgi_temp_path %[3]s/%[4]s-u; scgi_temp_path %[3]s/%[4]s-s;
	%[5]s
}
`, user, workers, dir, name, http(address))
	file := filepath.Join(dir, name+".conf")
	if err := os.WriteFile(file, []byte(conf), 0o644); err != nil {
		return nil, err
	}
	quit := func(cmd *exec.Cmd) error { return cmd.Process.Signal(syscall.SIGTERM) }
	n := &nginx{child: newChild(ctx, quit, path, "-c", file, "-e", "stderr"), address: address}
	if err := n.start(); err != nil {
		return nil, fmt.Errorf("start nginx: %w", err)
	}
	if err := awaitListener(ctx, address, n.ended); err != nil {
		return nil, errors.Join(fmt.Errorf("nginx does not come up: %w", err), n.stop())
	}
	return n, nil
}

// awaitListener waits until somebody listens on an address.
func awaitListener(ctx context.Context, address string, ended <-chan struct{}) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-retry.C:
		case <-ended:
			return err
		case <-ctx.Done():
			return err
		}
	}
}

// servedProxy is the data plane's front in a process of its own.
type servedProxy struct {
	*pipedChild
	address string
}

func startServedProxy(ctx context.Context, command []string, dir string) (*servedProxy, error) {
	c, address, err := startPiped(ctx, nil, command, dir)
	if err != nil {
		return nil, fmt.Errorf("start proxy: %w", err)
	}
	return &servedProxy{c, address}, nil
}

// onLoopback resolves every sandbox to this machine.
type onLoopback struct{}

func (onLoopback) Resolve(_ context.Context, id string) (proxy.Target, error) {
	return proxy.Target{SandboxID: id, Addr: netip.AddrFrom4([4]byte{127, 0, 0, 1})}, nil
}

// ServeProxy is the data plane's front before this machine's own ports, in a
// process of its own: the server and the proxy that `wrenn up` runs, with what they
// log and count. It prints its address to out, and ends when in does.
func ServeProxy(in io.Reader, out io.Writer, dir string) error {
	if _, err := server.RaiseFileLimit(); err != nil {
		return err
	}
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	access, err := accesslog.Open(filepath.Join(dir, "wrenn-access.log"), nil)
	if err != nil {
		return err
	}
	front := server.New(server.Config{
		API:   http.NotFoundHandler(),
		Proxy: proxy.New(proxy.Config{Resolver: onLoopback{}, Domain: benchDomain, AccessLog: access}),
	})
	if _, err := fmt.Fprintln(out, l.Addr()); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer cancel()
		_, _ = io.Copy(io.Discard, in)
	}()
	err = front.Serve(ctx, server.Listeners{Plain: []net.Listener{l}})
	return errors.Join(err, access.Close(context.Background()))
}
