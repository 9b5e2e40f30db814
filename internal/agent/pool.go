package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// pool keeps what makes the next sandbox of a template quick: a memory image of
// the template, taken of an instance that was booted for it and never used, and
// instances restored from that image that wait for somebody to ask. Nothing ever
// comes back into it.
//
// It does its work one thing at a time, while no sandbox is being made for anybody.
type pool struct {
	agent  *Agent
	budget int64 // bytes of memory for waiting instances; 0: none wait
	kick   chan struct{}
	quiet  chan struct{} // gets one when the last sandbox under way is made

	mu      sync.Mutex
	shelves map[shelfKey]*shelf
	making  int                // sandboxes being made for somebody
	job     context.CancelFunc // ends what the pool is doing; nil while it does nothing
	jobDone chan struct{}

	counts poolCounts
}

// shelfKey is what sandboxes have to have in common to be made from one image.
type shelfKey struct {
	build     string
	resources sandbox.Resources
}

// shelf is what the pool has for one key.
type shelf struct {
	key     shelfKey
	image   image // dir is empty: not made yet
	spares  []*unit
	pinned  bool        // the operator wants it ready before anyone has asked
	demand  []time.Time // of the last demandWindow, oldest first
	retryAt time.Time   // after a failure
	size    int64       // memory that one instance takes, in bytes
}

const (
	demandWindow = time.Minute      // as many are kept ready as were asked for in this time
	shelfLife    = 10 * time.Minute // one is kept ready this long after the last was asked for
	poolTick     = 5 * time.Second
	poolPatience = 2 * time.Second // longest wait for a quiet moment
	poolRetry    = 30 * time.Second
	spareGuess   = 40 << 20 // bytes of memory, before one was measured
	shelvesKept  = 32
)

func newPool(a *Agent, budget int64) *pool {
	return &pool{
		agent: a, budget: budget, shelves: make(map[shelfKey]*shelf),
		kick: make(chan struct{}, 1), quiet: make(chan struct{}, 1), counts: newPoolCounts(),
	}
}

// dir has the memory images of templates.
func (p *pool) dir() string { return filepath.Join(p.agent.cfg.Dir, "warm") }

// imageDir names the image by everything that it depends on.
func (p *pool) imageDir(key shelfKey) string {
	rt := p.agent.cfg.Runtime
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %+v %s %s %s", key.build, key.resources, rt.Name(), rt.Version(), filepath.Base(p.agent.cfg.GuestInit)))
	return filepath.Join(p.dir(), hex.EncodeToString(sum[:10]))
}

// busy notes that a sandbox is being made for somebody; the pool waits until the
// function that it returns is called.
func (p *pool) busy() func() {
	p.mu.Lock()
	p.making++
	p.mu.Unlock()
	return func() {
		p.mu.Lock()
		p.making--
		last := p.making == 0
		p.mu.Unlock()
		if last {
			signal(p.quiet)
		}
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // there is one already
	}
}

// take gives an instance that waits, or nil. It is the caller's from then on.
func (p *pool) take(key shelfKey) *unit {
	defer signal(p.kick)
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.shelf(key)
	s.demand = append(s.demand, time.Now())
	for len(s.spares) > 0 {
		u := s.spares[0]
		s.spares = s.spares[1:]
		select {
		case <-u.inst.Done():
			p.agent.release(u)
		default:
			p.counts.hits.Inc()
			return u
		}
	}
	p.counts.misses.Inc()
	return nil
}

// image gives the template's memory image, if there is one.
func (p *pool) image(key shelfKey) (image, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.shelf(key)
	if len(s.demand) == 0 { // asked for without the pool
		s.demand = append(s.demand, time.Now())
	}
	return s.image, s.image.dir != ""
}

// pin has the pool keep a sandbox ready that nobody has asked for yet.
func (p *pool) pin(key shelfKey) {
	p.mu.Lock()
	p.shelf(key).pinned = true
	p.mu.Unlock()
	signal(p.kick)
}

// discardImage forgets an image that cannot be used. The caller holds no lock.
func (p *pool) discardImage(key shelfKey) {
	p.mu.Lock()
	s := p.shelf(key)
	dir := s.image.dir
	s.image = image{}
	p.mu.Unlock()
	if dir != "" {
		if err := removeImage(dir); err != nil {
			p.agent.log.Error("remove a template's memory image", "err", err)
		}
	}
}

// shelf returns the shelf of key, with the image that an earlier agent made. The
// caller holds mu.
func (p *pool) shelf(key shelfKey) *shelf {
	if s := p.shelves[key]; s != nil {
		return s
	}
	s := &shelf{key: key}
	if im, err := openImage(p.imageDir(key), p.agent.cfg.Runtime); err == nil {
		s.image = im
	}
	p.shelves[key] = s
	return s
}

// run does the pool's work until ctx ends, and then frees what waits.
func (p *pool) run(ctx context.Context) {
	tick := time.NewTicker(poolTick)
	defer tick.Stop()
	defer p.drain()
	for {
		for p.step(ctx) {
		}
		select {
		case <-ctx.Done():
			return
		case <-p.kick:
		case <-tick.C:
		}
	}
}

// step does the most urgent thing there is to do, if any.
func (p *pool) step(ctx context.Context) (did bool) {
	if ctx.Err() != nil {
		return false
	}
	job := p.next(time.Now())
	if job == nil {
		return false
	}
	p.awaitQuiet(ctx)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	p.mu.Lock()
	p.job, p.jobDone = cancel, done
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.job, p.jobDone = nil, nil
		p.mu.Unlock()
		cancel()
		close(done)
	}()
	if err := job(ctx); err != nil && ctx.Err() == nil {
		p.agent.log.Warn("keep sandboxes ready", "err", err)
	}
	return true
}

// giveBack frees something that the pool holds, for somebody who finds nothing
// left, and reports whether there was any.
func (p *pool) giveBack(ctx context.Context) bool {
	p.mu.Lock()
	later := time.Now().Add(poolRetry)
	var u *unit
	for _, s := range p.shelves {
		s.retryAt = later
		if u == nil && len(s.spares) > 0 {
			u, s.spares = s.spares[0], s.spares[1:]
		}
	}
	cancel, done := p.job, p.jobDone
	p.mu.Unlock()
	switch {
	case u != nil:
		p.agent.release(u)
		return p.agent.awaitRelease(ctx)
	case cancel == nil:
		return false
	}
	cancel()
	select {
	case <-done:
		return true
	case <-ctx.Done():
		return false
	}
}

// awaitQuiet waits until nobody waits for a sandbox, but not for ever: under a
// constant load the pool would never fill.
func (p *pool) awaitQuiet(ctx context.Context) {
	patience := time.NewTimer(poolPatience)
	defer patience.Stop()
	for {
		p.mu.Lock()
		quiet := p.making == 0
		p.mu.Unlock()
		if quiet {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-patience.C:
			return
		case <-p.quiet:
		}
	}
}

// next decides what to do.
func (p *pool) next(now time.Time) func(context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	short := p.memoryShort()
	var used int64
	for _, s := range p.shelves {
		used += int64(len(s.spares)) * s.sizeOf()
	}
	for key, s := range p.shelves {
		want := s.want(now)
		if short || p.budget == 0 {
			want = 0
		}
		switch {
		case len(s.spares) > want:
			u := s.spares[0]
			s.spares = s.spares[1:]
			return func(context.Context) error { p.agent.release(u); return nil }
		case now.Before(s.retryAt):
		case s.image.dir == "" && s.asked(now):
			return func(ctx context.Context) error { return p.makeImage(ctx, s) }
		case s.image.dir != "" && len(s.spares) < want && used+s.sizeOf() <= p.budget:
			return func(ctx context.Context) error { return p.addSpare(ctx, s) }
		case !s.asked(now) && len(s.spares) == 0 && len(p.shelves) > shelvesKept:
			delete(p.shelves, key) // the image stays on the disk
		}
	}
	return nil
}

// memoryShort reports whether the host needs what waits.
func (p *pool) memoryShort() bool {
	free, err := availableMemory()
	return err == nil && free < 2*reservedMemory
}

func (s *shelf) sizeOf() int64 {
	if s.size == 0 {
		return spareGuess
	}
	return s.size
}

// asked reports whether anybody has use for the shelf.
func (s *shelf) asked(now time.Time) bool {
	return s.pinned || len(s.demand) > 0 && now.Sub(s.demand[len(s.demand)-1]) < shelfLife
}

// want is how many are to wait.
func (s *shelf) want(now time.Time) int {
	for len(s.demand) > 1 && now.Sub(s.demand[0]) > demandWindow {
		s.demand = s.demand[1:]
	}
	if !s.asked(now) {
		return 0
	}
	return max(1, len(s.demand))
}

// origin is what the shelf's instances are started from.
func (p *pool) origin(s *shelf) (origin, error) {
	rootfs, err := p.agent.rootfs(s.key.build)
	return origin{
		rootfs: rootfs, guestInit: p.agent.cfg.GuestInit, resources: s.key.resources,
		policy: network.Policy{AllowInternet: true}, spare: true,
	}, err
}

// makeImage boots the template and writes what it is then to disk.
func (p *pool) makeImage(ctx context.Context, s *shelf) (err error) {
	defer func() { p.made(s, err) }()
	a, began := p.agent, time.Now()
	ctx, cancel := context.WithTimeout(ctx, createLimit)
	defer cancel()
	o, err := p.origin(s)
	if err != nil {
		return err
	}
	u, err := a.startUnit(ctx, o)
	if err != nil {
		return fmt.Errorf("boot template %s: %w", s.key.build, err)
	}
	defer func() {
		if ferr := a.freeUnit(u); ferr != nil {
			a.release(u)
		}
	}()
	if err := u.whileAlive(ctx, u.guest.AwaitHealth); err != nil {
		return fmt.Errorf("boot template %s: %w", s.key.build, err)
	}
	dir := p.imageDir(s.key)
	im, err := a.writeAndSeal(ctx, u, dir, manifest{
		Kind: runtime.ImageMemory, Runtime: a.cfg.Runtime.Name(), RuntimeVersion: a.cfg.Runtime.Version(),
		GuestInit: filepath.Base(a.cfg.GuestInit), BuildID: s.key.build, Resources: s.key.resources,
	}, true)
	if err != nil {
		return fmt.Errorf("write memory image of template %s: %w", s.key.build, err)
	}
	p.mu.Lock()
	s.image = im
	p.mu.Unlock()
	a.log.Info("wrote a template's memory image", "build", s.key.build, "bytes", im.bytes(), "took", time.Since(began))
	return nil
}

// addSpare restores one instance and lets it wait.
func (p *pool) addSpare(ctx context.Context, s *shelf) (err error) {
	defer func() { p.made(s, err) }()
	ctx, cancel := context.WithTimeout(ctx, createLimit)
	defer cancel()
	o, err := p.origin(s)
	if err != nil {
		return err
	}
	p.mu.Lock()
	im := s.image
	p.mu.Unlock()
	if im.dir == "" {
		return nil // discarded meanwhile
	}
	o.image = im.runtime()
	u, err := p.agent.startUnit(ctx, o)
	if errors.Is(err, sandbox.ErrInvalid) {
		p.discardImage(s.key)
	}
	if err != nil {
		return fmt.Errorf("restore template %s: %w", s.key.build, err)
	}
	if err := u.whileAlive(ctx, u.guest.AwaitHealth); err != nil {
		p.agent.release(u)
		return fmt.Errorf("restore template %s: %w", s.key.build, err)
	}
	stats, err := u.inst.Stats(ctx)
	if err != nil {
		p.agent.release(u)
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s.size = max(stats.MemoryBytes, 1<<20)
	s.spares = append(s.spares, u)
	return nil
}

// made puts a shelf off after a failure, whatever it was.
func (p *pool) made(s *shelf, err error) {
	if err == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s.retryAt = time.Now().Add(poolRetry)
}

// Ready is how many instances wait for a sandbox.
func (a *Agent) Ready() (n int) {
	ready, _, _ := a.pool.level()
	for _, m := range ready {
		n += m
	}
	return n
}

// level says how many instances wait and are to wait, by template build, and what
// memory they take, in bytes.
func (p *pool) level() (ready, want map[string]int, memory int64) {
	ready, want = make(map[string]int), make(map[string]int)
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, s := range p.shelves {
		ready[key.build] += len(s.spares)
		if p.budget > 0 {
			want[key.build] += s.want(now)
		}
		memory += int64(len(s.spares)) * s.sizeOf()
	}
	return ready, want, memory
}

// drain frees everything that waits.
func (p *pool) drain() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.shelves {
		for _, u := range s.spares {
			p.agent.release(u)
		}
		s.spares = nil
	}
}

// sweep removes the images that no shelf of this agent can have: of other builds,
// other engines, other guest agents. It runs before the pool does.
func (p *pool) sweep() error {
	entries, err := os.ReadDir(p.dir())
	if err != nil {
		return fmt.Errorf("sweep memory images of templates: %w", err)
	}
	for _, e := range entries {
		dir := filepath.Join(p.dir(), e.Name())
		im, err := openImage(dir, p.agent.cfg.Runtime)
		if err == nil && p.imageDir(shelfKey{build: im.BuildID, resources: im.Resources}) == dir {
			if _, err = p.agent.rootfs(im.BuildID); err == nil {
				continue
			}
		}
		if err := removeImage(dir); err != nil {
			return err
		}
	}
	return nil
}
