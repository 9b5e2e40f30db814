// Package pager serves the page faults of virtual machines whose memory comes out
// of images. It is a process of its own, for all virtual machines of a host: it
// outlives the agent, which finds everything again when it is back. A virtual
// machine whose memory it cannot serve is ended, with a reason, and never hangs.
package pager

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/memory"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Version is that of the protocol, and of what the pager can do: from 2 on it reads
// layers that are compressed. A client speaks to earlier ones too.
const Version = 2

const (
	maxVMs     = 4096
	maxRequest = 64 << 10
)

// Operations of a request.
const (
	opHello           = "hello"
	opRegister        = "register"
	opList            = "list"
	opRemove          = "remove"
	opFinishRecording = "finish-recording"
)

// request and response are a line of JSON each.
type request struct {
	Op string `json:"op"`
	ID string `json:"id,omitempty"`
	VM *VM    `json:"vm,omitempty"`
}

type response struct {
	Version int      `json:"version,omitempty"`
	VMs     []Status `json:"vms,omitempty"`
	Kind    string   `json:"kind,omitempty"` // of the error
	Error   string   `json:"error,omitempty"`
}

// Pager is the process's state.
type Pager struct {
	log     *slog.Logger
	hook    func(string) // of tests
	version int
	socket  string

	ctx context.Context // ends what serves virtual machines
	wg  sync.WaitGroup

	checks memory.Checks // of all images
	budget *budget

	mu  sync.Mutex
	vms map[string]*attachment
}

// Serve listens at socket until ctx ends. Then it ends the virtual machines too:
// they would hang without it. ready is called when it listens. There is one pager
// at a socket; a second one gives sandbox.ErrConflict.
func Serve(ctx context.Context, socket string, log *slog.Logger, ready func()) error {
	return newPager(log).serve(ctx, socket, ready)
}

func newPager(log *slog.Logger) *Pager {
	p := &Pager{log: log, version: Version, vms: map[string]*attachment{}}
	p.budget = &budget{limit: OwnMemory() / 2, shared: p.checks.Size}
	return p
}

func (p *Pager) serve(ctx context.Context, socket string, ready func()) error {
	p.socket = socket
	lock, err := os.OpenFile(socket+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("lock pager: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return sandbox.Errorf(sandbox.ErrConflict, "a pager is at %s already", socket)
		}
		return fmt.Errorf("lock pager: %w", err)
	}
	if err := p.endOrphans(); err != nil {
		return err
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove old socket: %w", err)
	}
	l, err := listen(socket)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	defer l.Close()
	var cancel context.CancelFunc
	p.ctx, cancel = context.WithCancel(ctx)
	defer p.wg.Wait()
	defer cancel()
	context.AfterFunc(p.ctx, func() { l.Close() })
	ready()
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept: %w", err)
		}
		p.wg.Go(func() { p.converse(conn) })
	}
}

// converse answers the requests of one connection.
func (p *Pager) converse(conn *net.UnixConn) {
	defer conn.Close()
	stop := context.AfterFunc(p.ctx, func() { conn.Close() })
	defer stop()
	h, err := peer(conn, os.Geteuid())
	if err != nil {
		p.log.Warn("turned away who may not ask", "err", err)
		return
	}
	h.Close()
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxRequest)
	enc := json.NewEncoder(conn)
	for lines.Scan() {
		var r request
		resp := response{}
		err := json.Unmarshal(lines.Bytes(), &r)
		if err == nil {
			resp, err = p.answer(r)
		}
		if err != nil {
			resp = response{Error: err.Error()}
			if kind := sandbox.Kind(err); kind != nil {
				resp.Kind = kind.Error()
			}
		}
		if enc.Encode(resp) != nil {
			return
		}
	}
}

func (p *Pager) answer(r request) (response, error) {
	switch r.Op {
	case opHello:
		return response{Version: p.version}, nil
	case opRegister:
		if r.VM == nil {
			return response{}, sandbox.Errorf(sandbox.ErrInvalid, "no virtual machine is given")
		}
		return response{}, p.register(*r.VM)
	case opList:
		return response{VMs: p.list()}, nil
	}
	p.mu.Lock()
	a := p.vms[r.ID]
	p.mu.Unlock()
	if a == nil {
		return response{}, sandbox.Errorf(sandbox.ErrNotFound, "no virtual machine %q is registered", r.ID)
	}
	switch r.Op {
	case opRemove:
		a.cancel()
		<-a.done
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.vms[r.ID] == a {
			delete(p.vms, r.ID)
		}
		return response{VMs: []Status{a.status()}}, nil
	case opFinishRecording:
		a.mu.Lock()
		s := a.server
		a.mu.Unlock()
		if s != nil && s.record != nil {
			a.saveSet(s.record)
		}
		return response{}, nil
	}
	return response{}, sandbox.Errorf(sandbox.ErrInvalid, "unknown operation %q", r.Op)
}

func (p *Pager) register(vm VM) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		return sandbox.Errorf(sandbox.ErrUnavailable, "the pager ends")
	}
	if p.vms[vm.ID] != nil {
		return sandbox.Errorf(sandbox.ErrConflict, "virtual machine %q is registered already", vm.ID)
	}
	if len(p.vms) >= maxVMs {
		return sandbox.Errorf(sandbox.ErrExhausted, "%d virtual machines are registered", len(p.vms))
	}
	a, err := p.attach(vm)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(p.ctx)
	a.cancel = cancel
	p.vms[vm.ID] = a
	p.wg.Go(func() {
		defer cancel()
		a.run(ctx)
	})
	return nil
}

func (p *Pager) list() []Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]Status, 0, len(p.vms))
	for _, a := range p.vms {
		all = append(all, a.status())
	}
	slices.SortFunc(all, func(a, b Status) int { return strings.Compare(a.ID, b.ID) })
	return all
}

// Ready is the line that `wrenn pager` prints when it listens.
const Ready = "ready"

// PrintReady prints it.
func PrintReady(w io.Writer) { fmt.Fprintln(w, Ready) }
