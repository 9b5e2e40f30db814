package pager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/internal/memory"
	"github.com/wrenn/wrenn/internal/process"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// States of a virtual machine.
const (
	StateWaiting = "waiting" // for its monitor to connect
	StateServed  = "served"
	StateEnded   = "ended" // the monitor has, by itself or for Reason
)

// VM is a virtual machine whose page faults are to be served.
type VM struct {
	ID     string `json:"id"`
	Image  string `json:"image"`  // directory of its memory image
	Socket string `json:"socket"` // where its monitor will connect; the pager makes it
	UID    int    `json:"uid"`    // the user that the monitor runs as

	// ReasonFile is written before the monitor is ended, and says why: whoever sees
	// its end finds the reason there, also when the pager knows nothing of it any
	// more. The monitor cannot write where it is.
	ReasonFile string `json:"reason_file,omitempty"`

	// WorkingSet is a file with the pages that are put in before they are asked for.
	// Where it is missing or Record is set, it is written: after RecordFor, at
	// FinishRecording, or at the end.
	WorkingSet string        `json:"working_set,omitempty"`
	Copy       string        `json:"copy,omitempty"` // what was recorded is written here too, if the directory is still there
	Record     bool          `json:"record,omitempty"`
	RecordFor  time.Duration `json:"record_for,omitempty"` // 0: 5 seconds

	Budget  int64 `json:"budget,omitempty"`  // bytes to put in that nobody asked for, beside the working set
	Around  int64 `json:"around,omitempty"`  // bytes that a fault puts in at most; 0: 64 KiB
	Threads int   `json:"threads,omitempty"` // 0: 2
}

// Status is how a virtual machine is.
type Status struct {
	VM
	State   string     `json:"state"`
	Monitor process.ID `json:"monitor,omitzero"`
	Reason  string     `json:"reason,omitempty"` // why the pager has ended the monitor

	Faults     int64         `json:"faults"`
	Copied     int64         `json:"copied"` // bytes
	Zeroed     int64         `json:"zeroed"` // bytes
	Prefetched time.Duration `json:"prefetched,omitempty"`
}

const (
	defaultRecord  = 5 * time.Second
	defaultThreads = 2
	maxThreads     = 16
	maxAround      = 2 << 20
)

func (v *VM) check() error {
	switch {
	case v.ID == "" || v.Image == "" || v.Socket == "":
		return sandbox.Errorf(sandbox.ErrInvalid, "a virtual machine needs an id, an image and a socket")
	case v.Threads < 0 || v.Threads > maxThreads:
		return sandbox.Errorf(sandbox.ErrInvalid, "threads: want 1 to %d", maxThreads)
	case v.Around < 0 || v.Around > maxAround || v.Around&(v.Around-1) != 0:
		return sandbox.Errorf(sandbox.ErrInvalid, "around: want a power of two up to %d", maxAround)
	case v.Budget < 0 || v.RecordFor < 0:
		return sandbox.Errorf(sandbox.ErrInvalid, "budget and record_for cannot be negative")
	}
	return nil
}

// attachment is a virtual machine that was registered.
type attachment struct {
	vm       VM
	image    *memory.Image
	own      account // of the pager's memory
	listener *listener
	log      *slog.Logger
	hook     func(string)
	note     func() error // tells where monitors are noted that there is another
	cancel   context.CancelFunc
	done     chan struct{} // closed when nothing of it runs any more

	saving sync.Mutex // held while the working set is written

	mu         sync.Mutex
	state      string
	monitor    process.ID
	reason     string
	server     *server
	prefetched time.Duration
}

// attach makes the virtual machine's socket. What it takes of memory is reserved by then.
func (p *Pager) attach(vm VM) (_ *attachment, err error) {
	if err := vm.check(); err != nil {
		return nil, err
	}
	a := &attachment{
		vm: vm, own: account{of: p.budget}, log: p.log.With("vm", vm.ID), hook: p.hook, note: p.noteMonitors,
		state: StateWaiting, done: make(chan struct{}),
	}
	if a.image, err = p.checks.Open(vm.Image); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			a.image.Close()
			a.own.close()
		}
	}()
	if err = a.own.need(a.footprint(memory.BlockSize)); err != nil {
		return nil, err
	}
	if a.listener, err = listen(vm.Socket); err != nil {
		return nil, fmt.Errorf("listen for monitor: %w", err)
	}
	if err = os.Lchown(vm.Socket, vm.UID, -1); err != nil {
		a.listener.Close()
		return nil, fmt.Errorf("listen for monitor: %w", err)
	}
	return a, nil
}

// run serves the virtual machine from the connection of its monitor to its end.
func (a *attachment) run(ctx context.Context) {
	defer close(a.done)
	defer a.own.close()
	defer a.image.Close()
	m, err := a.accept(ctx)
	if err == nil {
		err = a.serve(ctx, m)
	}
	reason := ""
	if !ended(err) {
		reason = err.Error()
		a.log.Error("cannot serve the memory of a virtual machine", "err", err)
	} else if m != nil && ctx.Err() != nil && !m.process.Ended() {
		reason = "its pager was told to let go of it"
	}
	a.mu.Lock()
	a.state, a.reason = StateEnded, reason
	a.mu.Unlock()
	if m == nil {
		return
	}
	if err := writeReason(a.vm.ReasonFile, reason); err != nil {
		a.log.Error("nobody is told why a virtual machine ends", "err", err)
	}
	// A monitor whose memory nobody serves would hang for ever.
	if err := m.process.Kill(); err != nil {
		a.log.Error("cannot end a virtual machine", "err", err)
	}
	m.close()
}

// writeReason leaves the reason for the end of a monitor, which still runs.
func writeReason(path, reason string) error {
	if path == "" || reason == "" {
		return nil
	}
	return os.WriteFile(path, []byte(reason), 0o600)
}

// accept waits for the monitor and takes what it hands over. A monitor that was
// let in is returned also with an error.
func (a *attachment) accept(ctx context.Context) (*monitor, error) {
	defer a.listener.Close()
	stop := context.AfterFunc(ctx, func() { a.listener.Close() })
	defer stop()
	for {
		conn, err := a.listener.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, fmt.Errorf("wait for monitor: %w", err)
		}
		m, err := a.take(ctx, conn)
		conn.Close()
		if m != nil {
			return m, err
		}
		if errors.Is(err, os.ErrProcessDone) { // it was one, and has ended since
			return nil, errEnded
		}
		a.log.Warn("turned away who is no monitor", "err", err)
	}
}

func (a *attachment) take(ctx context.Context, conn *net.UnixConn) (*monitor, error) {
	p, err := peer(conn, a.vm.UID)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	m := &monitor{process: p, fd: -1}
	a.mu.Lock()
	a.monitor = p.ID
	a.mu.Unlock()
	if err := a.note(); err != nil {
		return m, err
	}
	return m, m.shake(conn, a.image.Size())
}

// footprint is how many bytes of the pager's memory the virtual machine takes whose pages
// have this size. What a working set takes is not in it.
func (a *attachment) footprint(page int64) int64 {
	const rest = 160 << 10 // stacks, and where the memory is
	threads := cmp.Or(a.vm.Threads, defaultThreads)
	buffers := int64(threads)*bufferSize(page, sequential) +
		max(int64(prefetchers(threads))*bufferSize(page, pieceSize), bufferSize(page, sequential))
	return a.image.Footprint() + 2*bitmapSize(a.image.Size()/page) + buffers + rest
}

func (a *attachment) serve(ctx context.Context, m *monitor) error {
	if more := a.footprint(m.page) - a.footprint(memory.BlockSize); more > 0 {
		if err := a.own.need(more); err != nil {
			return err
		}
	}
	s := &server{guest: newGuest(a.image, m, a.hook), threads: cmp.Or(a.vm.Threads, defaultThreads), around: cmp.Or(a.vm.Around, pieceSize)}
	set := a.workingSet()
	if s.record = set.recorder; s.record != nil {
		defer a.saveSet(s.record)
	}
	defer set.close()
	a.mu.Lock()
	a.state, a.server = StateServed, s
	a.mu.Unlock()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.run(ctx) })
	g.Go(func() error {
		if err := m.process.Wait(ctx); err != nil {
			return err
		}
		return errEnded
	})
	g.Go(func() error { return a.unasked(ctx, s, set) })
	return g.Wait()
}

// unasked puts in what nobody has asked for yet.
func (a *attachment) unasked(ctx context.Context, s *server, set *workingSet) error {
	begin := time.Now()
	if err := s.prefetch(ctx, set.blocks); err != nil {
		return err
	}
	if len(set.blocks) > 0 {
		a.mu.Lock()
		a.prefetched = time.Since(begin)
		a.mu.Unlock()
	}
	set.close()
	if s.record != nil {
		if err := pause(ctx, cmp.Or(a.vm.RecordFor, defaultRecord)); err != nil {
			return err
		}
		a.saveSet(s.record)
	}
	if a.vm.Budget == 0 {
		return nil
	}
	// What nobody has asked for ends no machine: perhaps nobody ever does.
	if err := s.background(ctx, a.vm.Budget); err != nil && !ended(err) {
		a.log.Warn("the rest of the memory of a virtual machine comes when it is asked for", "err", err)
	}
	return nil
}

func (a *attachment) status() Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	st := Status{VM: a.vm, State: a.state, Monitor: a.monitor, Reason: a.reason, Prefetched: a.prefetched}
	if s := a.server; s != nil {
		st.Faults, st.Copied, st.Zeroed = s.served.Load(), s.copied.Load(), s.zeroed.Load()
	}
	return st
}
