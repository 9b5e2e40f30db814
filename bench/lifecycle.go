package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/internal/client"
)

// forks is how many sandboxes are forked at once.
const forks = 8

// lifecycleWarmUp is how many rounds are thrown away.
const lifecycleWarmUp = 3

// Lifecycle measures what a sandbox's life costs from outside: creating one with
// and without the warm pool and getting the first output of a command, running a
// command in one that is there, pausing, resuming, forking and killing it. The
// floors are the bare commands of runsc on the same template and guest agent, taken
// in turn with it.
func Lifecycle(ctx context.Context, p Platform, n int) (_ Report, err error) {
	r := Report{Bench: "lifecycle", Host: thisHost(runtimeName)}
	f, err := newFloor(ctx, p.DataDir)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, f.close(context.WithoutCancel(ctx))) }()
	image := filepath.Join(f.dir, "image")
	idle, _, err := f.boot(ctx)
	if err != nil {
		return r, fmt.Errorf("make floor: %w", err)
	}
	_, err = idle.checkpoint(ctx, image)
	if err = errors.Join(err, idle.stop(ctx)); err != nil {
		return r, fmt.Errorf("make floor's image: %w", err)
	}

	m := lifecycle{platform: p, floor: f, image: image, got: make(map[string]*samples)}
	for i := range n + lifecycleWarmUp {
		m.keep = i >= lifecycleWarmUp
		if err := m.round(ctx); err != nil {
			return r, err
		}
		if m.keep && i%10 == 0 {
			progress("lifecycle: %d of %d", i-lifecycleWarmUp+1, n)
		}
	}
	for i := range max(n/2, 1) + 1 {
		m.keep = i > 0
		if err := m.fork(ctx); err != nil {
			return r, err
		}
	}
	r.Results = m.results()
	return r, nil
}

// lifecycle is a run of the benchmark.
type lifecycle struct {
	platform Platform
	floor    *floor
	image    string // the floor's, of an idle sandbox that was just booted
	keep     bool   // past the warm-up
	got      map[string]*samples
}

// What is measured, in milliseconds.
const (
	lifePool         = "create to first output, warm pool"
	lifeImage        = "create to first output, without pool"
	lifeBoot         = "create to first output, booted"
	lifeExec         = "exec to first output"
	lifeLogin        = "login shell to first output"
	lifePause        = "pause"
	lifeResume       = "resume"
	lifeFork         = "fork of 8"
	lifeKill         = "kill"
	floorImage       = "floor: bare restore to first output"
	floorBoot        = "floor: bare create and start to first output"
	floorPause       = "floor: bare checkpoint"
	floorResume      = "floor: bare restore to first answer"
	floorFork        = "floor: 8 bare restores at once"
	startImage       = "image"
	startBoot        = "boot"
	pausePoolRefills = 400 * time.Millisecond
)

func (m *lifecycle) add(name string, d time.Duration) {
	if !m.keep {
		return
	}
	if m.got[name] == nil {
		m.got[name] = new(samples)
	}
	m.got[name].addMillis(d)
}

func (m *lifecycle) results() []Result {
	get := func(name string) samples {
		if s := m.got[name]; s != nil {
			return *s
		}
		return nil
	}
	result := func(name string) Result { return get(name).result(name, "ms") }
	pool := get(lifePool)
	warm := result(lifePool).noted("POST /v2/sandboxes, then /bin/echo")
	return []Result{
		warm.want("p50 ≤ 40, p99 ≤ 120", pool.quantile(.5) <= 40 && pool.quantile(.99) <= 120),
		result(lifeImage).against(get(floorImage), 1.2).noted("restored from the template's memory image; floor: runsc restore to the output of the same command"),
		result(lifeBoot).against(get(floorBoot), 1.25),
		result(lifePause).against(get(floorPause), 1.25).noted("idle sandbox, until it is on disk, synced; floor: runsc checkpoint, not synced"),
		result(lifeResume).against(get(floorResume), 1.25).noted("until the guest agent has answered; floor: runsc restore to its first answer"),
		result(lifeFork).against(get(floorFork), 1.3).noted("its snapshot included; floor: 8 runsc restores at once, until all have answered"),
		result(lifeExec).noted("/bin/echo"),
		result(lifeLogin).noted("/bin/bash -l -c echo, as E2B's commands.run"),
		result(lifeKill).noted("until everything is freed"),
		result(floorImage), result(floorBoot), result(floorPause), result(floorResume), result(floorFork),
	}
}

// round measures everything once, each beside its floor.
func (m *lifecycle) round(ctx context.Context) error {
	for _, step := range []func(context.Context) error{m.bareImage, m.fromImage, m.bareBoot, m.fromBoot, m.awaitPool, m.fromPool} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// bareImage restores the floor's image, checkpoints what it is then, and restores
// that.
func (m *lifecycle) bareImage(ctx context.Context) (err error) {
	b, restore, err := m.floor.restore(ctx, m.image)
	if err != nil {
		return fmt.Errorf("restore floor: %w", err)
	}
	output, err := b.firstOutput(ctx, "/bin/echo", "hello")
	var pause time.Duration
	paused := filepath.Join(m.floor.dir, "paused")
	if err == nil {
		pause, err = b.checkpoint(ctx, paused)
	}
	defer os.RemoveAll(paused)
	if err = errors.Join(err, b.stop(ctx)); err != nil {
		return fmt.Errorf("checkpoint floor: %w", err)
	}
	b, resume, err := m.floor.restore(ctx, paused)
	if err != nil {
		return fmt.Errorf("restore floor: %w", err)
	}
	m.add(floorImage, restore+output)
	m.add(floorPause, pause)
	m.add(floorResume, resume)
	return b.stop(ctx)
}

func (m *lifecycle) bareBoot(ctx context.Context) error {
	b, boot, err := m.floor.boot(ctx)
	if err != nil {
		return fmt.Errorf("boot floor: %w", err)
	}
	output, err := b.firstOutput(ctx, "/bin/echo", "hello")
	m.add(floorBoot, boot+output)
	return errors.Join(err, b.stop(ctx))
}

// create makes a sandbox and measures until the first output.
func (m *lifecycle) create(ctx context.Context, name, start string) (*client.Sandbox, error) {
	begin := time.Now()
	info, err := m.platform.Client.Create(ctx, client.CreateRequest{TemplateID: "base", Timeout: time.Hour, Start: start})
	if err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	s := m.platform.Client.Sandbox(info)
	if err := firstOutput(ctx, s, "/bin/echo", "hello"); err != nil {
		return nil, errors.Join(err, m.platform.Client.Kill(context.WithoutCancel(ctx), s.ID()))
	}
	m.add(name, time.Since(begin))
	return s, nil
}

// time measures one call.
func (m *lifecycle) time(name string, call func() error) error {
	begin := time.Now()
	if err := call(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	m.add(name, time.Since(begin))
	return nil
}

func (m *lifecycle) kill(ctx context.Context, s *client.Sandbox) error {
	return m.time(lifeKill, func() error { return m.platform.Client.Kill(context.WithoutCancel(ctx), s.ID()) })
}

// fromImage measures a sandbox of the template's memory image, its pause and its
// resume.
func (m *lifecycle) fromImage(ctx context.Context) error {
	s, err := m.create(ctx, lifeImage, startImage)
	if err != nil {
		return err
	}
	c := m.platform.Client
	err = m.time(lifePause, func() error { return c.Pause(ctx, s.ID(), true) })
	if err == nil {
		err = m.time(lifeResume, func() error {
			_, _, err := c.Connect(ctx, s.ID(), client.ConnectRequest{Timeout: time.Hour})
			return err
		})
	}
	return errors.Join(err, m.kill(ctx, s))
}

func (m *lifecycle) fromBoot(ctx context.Context) error {
	s, err := m.create(ctx, lifeBoot, startBoot)
	if err != nil {
		return err
	}
	return m.kill(ctx, s)
}

// awaitPool gives the pool the time to refill that it has when not all of a machine
// goes into making sandboxes.
func (m *lifecycle) awaitPool(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(pausePoolRefills):
		return nil
	}
}

func (m *lifecycle) fromPool(ctx context.Context) error {
	s, err := m.create(ctx, lifePool, "")
	if err != nil {
		return err
	}
	err = m.time(lifeExec, func() error { return firstOutput(ctx, s, "/bin/echo", "hello") })
	if err == nil {
		err = m.time(lifeLogin, func() error { return firstOutput(ctx, s, "/bin/bash", "-l", "-c", "echo hello") })
	}
	return errors.Join(err, m.kill(ctx, s))
}

// fork measures a fork of eight beside as many bare restores at once.
func (m *lifecycle) fork(ctx context.Context) (err error) {
	var g errgroup.Group
	bares := make([]*bare, forks)
	begin := time.Now()
	for i := range bares {
		g.Go(func() (err error) {
			bares[i], _, err = m.floor.restore(ctx, m.image)
			return err
		})
	}
	err = g.Wait()
	m.add(floorFork, time.Since(begin))
	for _, b := range bares {
		if b != nil {
			err = errors.Join(err, b.stop(ctx))
		}
	}
	if err != nil {
		return fmt.Errorf("restore floors at once: %w", err)
	}

	c := m.platform.Client
	source, err := m.platform.create(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Kill(context.WithoutCancel(ctx), source.ID())) }()
	if err := m.awaitPool(ctx); err != nil {
		return err
	}
	var made []client.Fork
	err = m.time(lifeFork, func() (err error) {
		made, err = c.Fork(ctx, source.ID(), forks, time.Hour)
		for _, one := range made {
			err = errors.Join(err, one.Err)
		}
		return err
	})
	for _, one := range made {
		if one.Err == nil {
			err = errors.Join(err, c.Kill(context.WithoutCancel(ctx), one.Sandbox.SandboxID))
		}
	}
	return err
}
