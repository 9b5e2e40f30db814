// Package envd is the guest agent: the part of the platform that runs inside
// every sandbox and serves its processes, terminals, files and watches over
// HTTP. It depends on nothing of the rest of the platform but the RPC messages.
package envd

import (
	"context"
	"log/slog"
	"math"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/filesystem/filesystemconnect"
	"github.com/wrenn/wrenn/api/proto/process/processconnect"
	"github.com/wrenn/wrenn/internal/envd/access"
	"github.com/wrenn/wrenn/internal/envd/files"
	"github.com/wrenn/wrenn/internal/envd/filesystem"
	"github.com/wrenn/wrenn/internal/envd/forward"
	"github.com/wrenn/wrenn/internal/envd/logs"
	"github.com/wrenn/wrenn/internal/envd/machine"
	"github.com/wrenn/wrenn/internal/envd/metrics"
	"github.com/wrenn/wrenn/internal/envd/mmds"
	"github.com/wrenn/wrenn/internal/envd/process"
	"github.com/wrenn/wrenn/internal/envd/reclaim"
	"github.com/wrenn/wrenn/internal/envd/settings"
	"github.com/wrenn/wrenn/internal/envd/user"
	"github.com/wrenn/wrenn/internal/envd/version"
)

// Version is the version that the agent reports.
const Version = version.Version

// maxMessage is the size of the largest message, in bytes, also of one that comes
// compressed. Reading one takes several times its size, of memory that is the
// sandbox's. Input of 24 MiB fits as JSON.
const maxMessage = 33 << 20

// Config of an Agent.
type Config struct {
	// Init makes the agent reap orphans: it is pid 1, or stands in for it.
	Init bool
	// OwnsMachine lets the agent change what is the whole system's: its clock,
	// and the files in /run that say which sandbox it is.
	OwnsMachine bool
	// Forward makes listeners on loopback addresses reachable from outside. Never
	// on a machine that is not the sandbox's alone: its services would be exposed.
	Forward bool
	// Cgroups is a directory in a cgroup hierarchy of version 2 that is the agent's:
	// its processes get groups there. Where the machine is the agent's it takes the
	// whole hierarchy.
	Cgroups string
	// Prefer puts the agent before its processes for the processor and when memory
	// runs out, as OwnsMachine does.
	Prefer bool
	// Machine is the virtual machine whose pid 1 the agent is; else nil.
	Machine *machine.Machine
	// Name makes the sandbox's id the hostname; nil where the hostname is not the
	// sandbox's alone.
	Name func(id string) error
	// Metadata answers who the machine is; nil where nothing does.
	Metadata *mmds.Client
	// HashedToken says that Metadata has the hash of the token that /init may bring.
	HashedToken bool
}

// Agent is the guest agent. Make one with New.
type Agent struct {
	guard     access.Guard
	settings  settings.Settings
	ring      *logs.Ring
	log       *slog.Logger
	meter     metrics.Meter
	reaper    *process.Reaper
	watches   *filesystem.Service
	handler   http.Handler
	init      initializer
	reclaimer reclaim.Reclaimer

	forwarder   *forward.Forwarder // nil if not asked for
	ownsMachine bool
	prefer      bool
	cgroups     string
	machine     *machine.Machine
	name        func(id string) error
	setClock    func(time.Time) error
	metadata    *mmds.Client
	hashedToken bool
	known       bool          // /init has said who the sandbox is, in this life; init.mu holds it
	identified  bool          // everything in the sandbox knows which one it is; init.mu holds it
	woken       chan struct{} // gets one after each boot and resume
}

// New returns an agent that does nothing yet.
func New(c Config) *Agent {
	a := &Agent{ring: logs.NewRing(logs.DefaultSize), reaper: process.NewReaper(c.Init), ownsMachine: c.OwnsMachine}
	a.machine, a.name, a.metadata, a.hashedToken = c.Machine, c.Name, c.Metadata, c.HashedToken
	a.prefer, a.cgroups = c.Prefer || c.OwnsMachine, c.Cgroups
	a.setClock, a.woken = setClock, make(chan struct{}, 1)
	a.log = slog.New(a.ring.Handler(slog.LevelInfo))
	if a.machine != nil {
		for _, err := range a.machine.Problems() {
			a.log.Warn("a duty of the machine's first process failed", "error", err)
		}
	}
	a.watches = filesystem.NewService(&a.settings, a.log)
	if c.Forward {
		a.forwarder = newForwarder(a.log)
	}
	a.handler = a.routes()
	return a
}

// Serve answers on l until ctx ends. The processes it started keep running.
func (a *Agent) Serve(ctx context.Context, l net.Listener) error {
	// Whatever the agent holds ends with it, also when serving fails.
	ctx, cancel := context.WithCancel(ctx)
	reaping := make(chan struct{})
	go func() {
		defer close(reaping)
		a.reaper.Run(ctx)
	}()
	identifying := make(chan struct{})
	go func() {
		defer close(identifying)
		if a.metadata != nil {
			a.followIdentity(ctx)
		}
	}()
	forwarding := make(chan struct{})
	go func() {
		defer close(forwarding)
		a.runForwarder(ctx, l)
	}()
	defer func() {
		cancel()
		<-forwarding
		<-identifying
		<-reaping
		a.watches.Close()
	}()
	err := a.runProcesses(ctx, func() error { return a.serveHTTP(ctx, watchPeers(ctx, l, peerCheck)) })
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (a *Agent) routes() http.Handler {
	transfer := files.NewHandler(&a.guard, &a.settings, a.log)
	open := http.NewServeMux() // these check access themselves, or need none
	open.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(http.StatusNoContent)
	})
	open.HandleFunc("POST /init", a.serveInit)
	open.HandleFunc("GET /files", transfer.Download)
	open.HandleFunc("POST /files", transfer.Upload)

	guarded := http.NewServeMux()
	guarded.HandleFunc("GET /metrics", a.serveMetrics)
	guarded.HandleFunc("GET /envs", a.serveEnvs)
	guarded.HandleFunc("GET /logs", a.serveLogs)
	guarded.HandleFunc("POST /poweroff", a.servePowerOff)
	guarded.HandleFunc("POST /sync", a.serveSync)
	guarded.HandleFunc("POST /files/compose", transfer.Compose)
	// Messages may come compressed, but answers are not: they go over a link to
	// the host next door, and the sandbox's processors are its user's.
	options := connect.WithHandlerOptions(
		connect.WithCompressMinBytes(math.MaxInt), connect.WithReadMaxBytes(maxMessage))
	path, processes := processconnect.NewProcessHandler(process.NewService(a.reaper, &a.settings, a.log), options, process.WithJSON())
	guarded.Handle(path, a.wakeForwarder(process.BatchFlushes(processes)))
	guarded.Handle(filesystemconnect.NewFilesystemHandler(a.watches, options))
	open.Handle("/", a.requireToken(guarded))
	return a.reclaimer.After(allowOrigins(withUser(open)))
}

// requireToken lets only those in who have the access token.
func (a *Agent) requireToken(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := a.guard.CheckHeader(r); err != nil {
			files.WriteError(w, http.StatusUnauthorized, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// withUser notes whom the request names as its user, by basic authentication
// without a password.
func withUser(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if name, _, ok := r.BasicAuth(); ok && name != "" {
			r = r.WithContext(user.WithName(r.Context(), name))
		}
		next.ServeHTTP(w, r)
	})
}

// allowOrigins lets pages of any origin talk to the agent: what protects it is
// the token, which no other page has.
func allowOrigins(next http.Handler) http.Handler {
	const maxAge = 2 * time.Hour
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Origin") == "" {
			next.ServeHTTP(w, r)
			return
		}
		h := w.Header()
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("Access-Control-Expose-Headers", "*, Location, Cache-Control, X-Content-Type-Options")
		if r.Method == http.MethodOptions && r.Header.Get("Access-Control-Request-Method") != "" {
			h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, PATCH, DELETE")
			requested := r.Header.Values("Access-Control-Request-Headers")
			h.Set("Access-Control-Allow-Headers", strings.Join(requested, ","))
			h.Set("Access-Control-Max-Age", strconv.Itoa(int(maxAge.Seconds())))
			w.WriteHeader(http.StatusNoContent)
			return
		}
		next.ServeHTTP(w, r)
	})
}
