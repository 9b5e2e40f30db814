// Package proxy is the data plane: it finds out which sandbox and port a request
// is for, carries it there and the answer back, byte for byte and without
// collecting bodies, and breaks every stream of a sandbox off when it is gone.
//
// Each sandbox has two connection pools of its own, one for the ports of the
// user's applications and one for the guest agent's port. Nothing is shared
// between them, so applications at full load do not slow terminals, and a
// connection made for one sandbox can never serve another that got its address.
package proxy

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/wrenn/wrenn/internal/accesslog"
)

// AgentPort is the guest agent's port inside every sandbox.
const AgentPort = 49983

// Target says where a sandbox is reached.
type Target struct {
	SandboxID string
	Addr      netip.Addr // at which all its ports are reached on its host
	Access    Access     // who may reach them
	// Agent is where the data plane of the sandbox's host agent listens, when the
	// sandbox is on another host: then requests go there, see Config.Hop.
	Agent netip.AddrPort
	// Wake, unless nil, says that the sandbox is paused and is to be resumed for
	// whoever may reach it; it returns where it is reached then.
	Wake func(ctx context.Context) (Target, error)
}

// A Resolver finds running sandboxes. Errors are of the kinds of package sandbox:
// ErrNotFound (and ErrInvalid) become the 502 that clients take for "gone", the
// kinds for passing trouble a 503, an error without a kind a 500.
type Resolver interface {
	Resolve(ctx context.Context, id string) (Target, error)
}

// DialFunc opens a connection to a guest's port.
type DialFunc func(ctx context.Context, network, addr string) (net.Conn, error)

// Config is what a Proxy needs.
type Config struct {
	Resolver Resolver
	// Domain is the suffix of sandbox hosts, "{port}-{id}.{Domain}"; a port in it
	// is ignored. Without a Domain any suffix is good, see Proxy.Route.
	Domain string
	Log    *slog.Logger
	Dial   DialFunc // nil: TCP

	// Hop makes it the data plane of a host agent, which fronts alone may reach:
	// requests come as /proxy/{id}/{port}/… whatever their host is, say truly where
	// they come from, and get the application's answer as it is. The front rewrites
	// it: only it knows what the client sees.
	Hop bool

	// Limit is how many requests and upgraded connections may be open at once to
	// the applications of one sandbox, and how many to its guest agent. Zero:
	// DefaultLimit.
	Limit int

	AccessLog *accesslog.Log // gets a line for each request; nil: there is none
}

// DefaultLimit bounds what one sandbox can take of the proxy's connections.
const DefaultLimit = 4096

// Proxy is an http.Handler for data-plane requests.
type Proxy struct {
	resolver Resolver
	domain   string // host name in lower case, no port; may be empty
	log      *slog.Logger
	dial     DialFunc
	hop      bool
	limit    int
	buffers  bufferPool

	accessLog *accesslog.Log // may be nil
	ledger    ledger

	mu     sync.Mutex // guards the rest and the insides of every guest
	guests map[string]*guest
	open   int // requests under way
	closed bool
}

// New returns a proxy. Close ends it.
func New(cfg Config) *Proxy {
	p := &Proxy{
		resolver:  cfg.Resolver,
		domain:    hostname(cfg.Domain),
		log:       cfg.Log,
		dial:      cfg.Dial,
		hop:       cfg.Hop,
		limit:     cfg.Limit,
		accessLog: cfg.AccessLog,
		guests:    make(map[string]*guest),
	}
	if p.limit == 0 {
		p.limit = DefaultLimit
	}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	if p.dial == nil {
		p.dial = (&net.Dialer{Timeout: dialTimeout, KeepAlive: 15 * time.Second}).DialContext
	}
	return p
}

// ServeHTTP serves a data-plane request; one that is for no sandbox gets 400.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	d, ok, err := p.Route(r)
	switch {
	case err != nil:
		RouteError(w, err)
	case !ok:
		RouteError(w, errInvalidHost)
	default:
		p.Forward(w, r, d)
	}
}

// Forward carries a request to d. It panics with http.ErrAbortHandler when the
// answer breaks off after its header was sent, as httputil.ReverseProxy does.
func (p *Proxy) Forward(w http.ResponseWriter, r *http.Request, d Destination) {
	tunnel := tunnels(r)
	if tunnel {
		if refused := refuseTunnel(w, r, d); refused != nil {
			p.turnAway(w, r, d, *refused)
			return
		}
	} else if r.Method == http.MethodConnect && (!isExtendedConnect(r) || d.Port == AgentPort) {
		p.turnAway(w, r, d, failure{Message: "CONNECT is not served here", Code: http.StatusMethodNotAllowed})
		return
	}
	closesOld(w, r)
	if wrong := malformed(r); wrong != "" {
		p.turnAway(w, r, d, failure{Message: wrong, Code: http.StatusBadRequest})
		return
	}
	target, ok := rawTarget(r)
	if !ok {
		p.turnAway(w, r, d, failure{Message: "The request target is malformed", Code: http.StatusBadRequest})
		return
	}
	if d.Prefix != "" {
		if target.path = strings.TrimPrefix(target.path, d.Prefix); target.path == "" && !tunnel {
			withSlash(w, d, target)
			p.turnedAway(r, d, http.StatusPermanentRedirect, time.Now())
			return
		}
	}
	if d.Port == AgentPort && agentInternal(target.path) {
		p.turnAway(w, r, d, failure{Message: "This route of the guest agent is not reachable from outside", Code: http.StatusNotFound})
		return
	}

	s, refused := p.begin(w, r, d)
	if refused != nil {
		w.Header().Set("Retry-After", "1")
		p.refuseStream(w, r, d, *refused)
		return
	}
	s.open(r)
	defer p.end(s)
	s.target, s.tunnel = target, tunnel
	p.serve(s, r)
	s.complete = true // unless it panicked
}

// serve finds the sandbox and carries the request there.
func (p *Proxy) serve(s *stream, r *http.Request) {
	// Resolving comes after begin: if the sandbox goes away between the two,
	// Evict finds the stream and aborts it, and it never dials an address that
	// may belong to another sandbox by then.
	where, err := p.resolver.Resolve(s.ctx, s.dest.SandboxID)
	if err != nil {
		p.failResolve(s, r, err)
		return
	}
	s.aim(where)
	p.attribute(s)
	if !s.admit(r, where.Access) {
		return
	}
	if where.Wake != nil && !s.wake(r, where) {
		return
	}
	p.carry(s, r)
}

// carry sends the request on and the answer back.
func (p *Proxy) carry(s *stream, r *http.Request) {
	if r.ProtoMajor == 1 && s.upload != nil {
		// Otherwise net/http reads the rest of the request before it sends the
		// answer, and an application that answers while it reads would stall.
		// Failure means that the writer cannot do it, which is no reason to refuse.
		_ = http.NewResponseController(s.ResponseWriter).EnableFullDuplex()
	}
	exchange := p.exchange
	switch {
	case s.tunnel:
		exchange = p.tunnel
	case isGRPC(r) && s.dest.Port != AgentPort:
		exchange = p.exchangeGRPC
	}
	if err := exchange(s, r); err != nil {
		p.failForward(s, r, err)
	}
}

// Evict breaks off everything that goes on with a sandbox: requests that have no
// answer yet get the 502 of a sandbox that is gone, answers under way end in a
// reset, upgraded connections and idle ones are closed. Call it when the
// Resolver no longer resolves id, or resolves it to another place. It does not
// wait for the handlers to return.
func (p *Proxy) Evict(id string) {
	p.mu.Lock()
	p.ledger.forget(id)
	g := p.guests[id]
	if g == nil {
		p.mu.Unlock()
		return
	}
	streams, conns := p.detach(g)
	p.mu.Unlock()
	g.breakOff(streams, conns)
}

// Close evicts every sandbox and refuses requests from then on.
func (p *Proxy) Close() {
	p.mu.Lock()
	p.closed = true
	ids := make([]string, 0, len(p.guests))
	for id := range p.guests {
		ids = append(ids, id)
	}
	p.mu.Unlock()
	for _, id := range ids {
		p.Evict(id)
	}
}
