package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/wrenn/wrenn/api/proto/hostagent/hostagentconnect"
	"github.com/wrenn/wrenn/internal/accesslog"
	"github.com/wrenn/wrenn/internal/agent"
	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/controlplane"
	envd "github.com/wrenn/wrenn/internal/envd/version"
	"github.com/wrenn/wrenn/internal/guest"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/server"
	"github.com/wrenn/wrenn/internal/server/e2b"
	"github.com/wrenn/wrenn/internal/server/tlscert"
	"github.com/wrenn/wrenn/internal/store"
	"github.com/wrenn/wrenn/internal/store/sqlite"
	"github.com/wrenn/wrenn/internal/template"
)

// hostID is the name of the only host there is in one process.
const hostID = "local"

// stopLimit bounds the end of a platform, sandboxes included.
const stopLimit = 2 * time.Minute

// platform is control plane and host agent of one data directory, put together
// in one process.
type platform struct {
	dir    dataDir
	opts   upOptions
	log    *slog.Logger
	agent  *agent.Agent
	plane  *controlplane.ControlPlane
	proxy  *proxy.Proxy
	acme   *tlscert.ACME  // nil without ACME
	access *accesslog.Log // nil when it is off
	apiURL string
	remote bool // the host agent is another process

	runtime string // of the sandboxes here; empty before prepareAgent

	ended chan error // the first part that ended by itself says why
	kill  bool       // stop ends the sandboxes too
	undo  []func(context.Context) error
}

// startPlatform builds what is missing in the data directory, takes over the
// sandboxes that run there, and serves.
func startPlatform(ctx context.Context, dir dataDir, opts upOptions, progress io.Writer, log *slog.Logger) (*platform, error) {
	return newPlatform(dir, opts, log).start(ctx, progress)
}

func newPlatform(dir dataDir, opts upOptions, log *slog.Logger) *platform {
	return &platform{dir: dir, opts: opts, log: log, ended: make(chan error, 4)}
}

func (p *platform) start(ctx context.Context, progress io.Writer) (_ *platform, err error) {
	dir, opts, log := p.dir, p.opts, p.log
	defer func() {
		if err != nil {
			err = errors.Join(err, p.stop(false))
		}
	}()
	if files, err := server.RaiseFileLimit(); err != nil || files < 1<<16 {
		log.Warn("few files may be open at once, and each connection to a sandbox takes two", "files", files, "error", err)
	}
	// First, because it fails most often and costs nothing.
	listeners, err := p.listen()
	if err != nil {
		return nil, err
	}
	if err := dir.keepPrivate(); err != nil {
		return nil, err
	}
	if !p.remote {
		if err := p.prepareAgent(ctx); err != nil {
			return nil, err
		}
	}
	build, err := template.EnsureBase(ctx, template.Config{
		Dir: dir.templates(), TrustHostCAs: !opts.NoHostCAs, Progress: progress, Log: log,
	})
	if err != nil {
		return nil, fmt.Errorf("prepare base template: %w", err)
	}
	if err := p.startControlPlane(ctx, build); err != nil {
		return nil, err
	}
	p.serve(listeners)
	return p, nil
}

// listen opens the listeners, and with that settles address and domain.
func (p *platform) listen() (server.Listeners, error) {
	var l server.Listeners
	p.onStop(func(context.Context) error {
		for _, ln := range append(l.Plain, l.TLS...) {
			_ = ln.Close() // closed already when it was served
		}
		return nil
	})
	var err error
	if l.Plain, err = server.Listen(p.opts.Listen); err != nil {
		return l, fmt.Errorf("%w (choose another address with --listen)", err)
	}
	addr := l.Plain[0].Addr().(*net.TCPAddr)
	host, _, _ := net.SplitHostPort(p.opts.Listen)
	if addr.IP.IsUnspecified() || host == "" {
		host = "localhost"
	}
	p.apiURL = fmt.Sprintf("http://%s", net.JoinHostPort(host, fmt.Sprint(addr.Port)))
	if p.opts.Domain == "" {
		p.opts.Domain = fmt.Sprintf("wrenn.localhost:%d", addr.Port)
	}
	if p.opts.TLSListen == "" {
		return l, nil
	}
	if l.TLS, err = server.Listen(p.opts.TLSListen); err != nil {
		return l, fmt.Errorf("%w (choose another address with --tls-listen)", err)
	}
	l.TLSConfig, err = p.certificates(l)
	return l, err
}

func (p *platform) startControlPlane(ctx context.Context, build template.Build) error {
	db, err := sqlite.Open(ctx, p.dir.database())
	if err != nil {
		return fmt.Errorf("open store %s: %w", p.dir.database(), err)
	}
	p.onStop(func(context.Context) error { return db.Close() })
	master, err := loadMasterKey(p.dir.masterKey())
	if err != nil {
		return err
	}
	hostAgent, err := p.reachAgent(ctx)
	if err != nil {
		return err
	}
	p.plane = controlplane.New(controlplane.Config{
		Store: db, Agent: hostAgent, HostID: hostID, MasterKey: master, Log: p.log,
		OnGone: func(id string) { p.proxy.Evict(id) },
		Limits: controlplane.Limits{TeamSandboxes: p.opts.TeamSandboxes, TeamImageBytes: p.opts.TeamImages << 20},
	})
	if err := p.openAccessLog(); err != nil {
		return err
	}
	p.proxy = proxy.New(proxy.Config{Resolver: p.plane, Domain: p.opts.Domain, Log: p.log, Limit: p.opts.Connections, AccessLog: p.access})
	team, err := p.admitOperator(ctx)
	if err != nil {
		return err
	}
	err = p.plane.PutTemplate(ctx, store.Template{
		ID: build.TemplateID, Alias: build.Alias, TeamID: team.ID, Public: true, BuildID: build.ID,
		CPUs: build.CPUs, MemoryMiB: build.MemoryMiB, DiskMiB: build.DiskMiB,
		User: build.DefaultUser, Workdir: build.DefaultWorkdir, EnvVars: build.Env, EnvdVersion: envd.Version, Created: build.Created,
	})
	if err != nil {
		return fmt.Errorf("register base template: %w", err)
	}
	p.plane.KeepReady(build.TemplateID)
	p.run("control plane", p.plane.Run)
	p.onStop(func(ctx context.Context) error {
		if !p.kill || p.remote {
			return nil
		}
		return p.plane.EndAll(ctx, "the platform was shut down")
	})
	return nil
}

// openAgent starts the host agent of a data directory: it takes over the
// sandboxes that run there.
func openAgent(ctx context.Context, dir dataDir, opts upOptions, runtime string, log *slog.Logger) (*agent.Agent, engine, error) {
	bin := filepath.Join(dir.agent(), "bin")
	envd, err := guest.Install(bin)
	if err != nil {
		return nil, nil, err
	}
	rt, err := openRuntime(ctx, dir, runtime, log)
	if err != nil {
		return nil, nil, fmt.Errorf("prepare runtime: %w", err)
	}
	a, err := agent.Open(ctx, agent.Config{
		Dir: dir.agent(), Templates: dir.templates(), Runtime: rt, GuestInit: envd, Log: log,
		Pool: opts.PoolMemory << 20, CompressAfter: opts.CompressAfter,
		Network: network.Config{
			Tag: dir.tag(), CIDR: opts.NetworkCIDR, Allow: opts.AllowCIDRs, Resolver: opts.Resolver,
			Ready: opts.ReadySlots, TAP: makesMachines(runtime), Log: log,
		},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("start host agent: %w", err)
	}
	if err := removeStaleBinaries(bin, dir.agent(), append(keepOfRuntime(rt), envd)...); err != nil {
		log.Warn("remove what earlier builds left", "err", err) // it costs room and nothing else
	}
	return a, rt, nil
}

// reachAgent returns a client of the host agent: one of another process, at its
// socket, or one of this process, which it starts, over a listener in memory.
func (p *platform) reachAgent(ctx context.Context) (hostagentconnect.HostAgentClient, error) {
	dial := p.dir.dialAgent
	if !p.remote {
		lock, err := takeLock(ctx, p.dir, dataDir(p.dir.agent()))
		if err != nil {
			return nil, err
		}
		p.onStop(func(context.Context) error { lock.release(); return nil })
		if err := lock.describe(runningPlatform{PID: os.Getpid(), Program: programID(), Started: time.Now()}); err != nil {
			return nil, err
		}
		meeting := newInMemoryListener()
		if err := p.serveAgent(ctx, meeting); err != nil {
			return nil, err
		}
		dial = meeting.DialContext
	}
	transport := &http.Transport{DialContext: dial, MaxIdleConnsPerHost: 64, DisableCompression: true}
	p.onStop(func(context.Context) error { transport.CloseIdleConnections(); return nil })
	return hostagentconnect.NewHostAgentClient(&http.Client{Transport: transport}, "http://host-agent"), nil
}

// prepareAgent settles the runtime and makes the agent's directory ready for it,
// before the lock in it is taken.
func (p *platform) prepareAgent(ctx context.Context) (err error) {
	if err := mountDisks(ctx, p.dir); err != nil {
		return err
	}
	if p.runtime, err = p.opts.choose(ctx, p.dir, p.log); err != nil {
		return fmt.Errorf("choose runtime: %w", err)
	}
	return prepareAgentDir(ctx, p.dir, p.runtime, p.log)
}

// serveAgent starts the host agent and serves its RPC interface.
func (p *platform) serveAgent(ctx context.Context, at net.Listener) error {
	a, rt, err := openAgent(ctx, p.dir, p.opts, p.runtime, p.log)
	if err != nil {
		return err
	}
	p.agent = a
	p.onStop(func(ctx context.Context) error {
		end := a.Detach
		if p.kill {
			end = a.Shutdown
		}
		return errors.Join(end(ctx), rt.Close())
	})
	mux := http.NewServeMux()
	mux.Handle(a.Handler())
	mux.Handle("GET /metrics", agentMetrics(a))
	rpc := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	p.run("host agent's interface", func(context.Context) error { return rpc.Serve(at) })
	p.onStop(func(context.Context) error { return rpc.Close() })
	return nil
}

// admitOperator makes the default team and the local operator's API key, where
// they are missing, and writes down how to reach the platform.
func (p *platform) admitOperator(ctx context.Context) (store.Team, error) {
	creds, err := client.LoadCredentials(p.dir.credentials())
	if err != nil && !errors.Is(err, client.ErrNoPlatform) {
		return store.Team{}, fmt.Errorf("%w: restore the file, or remove it to get another API key", err)
	}
	if creds.APIKey == "" {
		secret := make([]byte, 20)
		rand.Read(secret)
		creds.APIKey = "e2b_" + hex.EncodeToString(secret)
	}
	team, err := p.plane.Bootstrap(ctx, creds.APIKey)
	if err != nil {
		return team, fmt.Errorf("make default team: %w", err)
	}
	creds.APIURL, creds.SandboxURL, creds.Domain = p.apiURL, p.apiURL, ""
	creds.CAFile = ""
	if p.opts.TLSListen != "" {
		creds.Domain = p.opts.Domain
	}
	if p.opts.tlsSource() == tlsLocal {
		creds.CAFile = p.dir.authority().Public
	}
	return team, creds.Save(p.dir.credentials())
}

func (p *platform) serve(l server.Listeners) {
	api := e2b.New(e2b.Config{ControlPlane: p.plane, Domain: p.opts.Domain, TLS: len(l.TLS) > 0, Metrics: p.metrics(), Log: p.log})
	front := server.New(server.Config{API: api, Proxy: p.proxy, Log: p.log})
	p.run("server", func(ctx context.Context) error { return front.Serve(ctx, l) })
	if p.acme != nil {
		// After the server, which answers what the ACME server asks.
		p.run("certificates", p.acme.Run)
	}
}

// run owns one goroutine: it ends when stop comes to it, and when it ends by
// itself the platform does.
func (p *platform) run(name string, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := f(ctx)
		if ctx.Err() == nil && !errors.Is(err, http.ErrServerClosed) {
			p.ended <- fmt.Errorf("%s ended: %w", name, err)
		}
	}()
	p.onStop(func(stopping context.Context) error {
		cancel()
		select {
		case <-done:
			return nil
		case <-stopping.Done():
			return fmt.Errorf("%s does not end: %w", name, stopping.Err())
		}
	})
}

// onStop adds a step to what ends the platform; the last one added comes first.
func (p *platform) onStop(f func(context.Context) error) { p.undo = append(p.undo, f) }

// stop ends the platform; with kill also its sandboxes, which go on otherwise.
func (p *platform) stop(kill bool) error {
	p.kill = kill
	ctx, cancel := context.WithTimeout(context.Background(), stopLimit)
	defer cancel()
	var errs []error
	for i := len(p.undo) - 1; i >= 0; i-- {
		errs = append(errs, p.undo[i](ctx))
	}
	p.undo = nil
	return errors.Join(errs...)
}

// loadMasterKey reads the key that access tokens are derived from, and makes it
// at the first start.
func loadMasterKey(path string) ([]byte, error) {
	key, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		key = make([]byte, 32)
		rand.Read(key)
		err = errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), writeFileSync(path, key))
	}
	if err != nil {
		return nil, fmt.Errorf("load master key: %w", err)
	}
	if len(key) != 32 {
		return nil, fmt.Errorf("master key %s has %d bytes, want 32: restore it from a backup, or remove it to make a new one (running sandboxes then become unreachable)", path, len(key))
	}
	return key, nil
}

// writeFileSync writes a secret so that after a crash it is there whole or not
// at all.
func writeFileSync(path string, data []byte) error {
	f, err := os.OpenFile(path+".tmp", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, werr := f.Write(data)
	if err := errors.Join(werr, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}
