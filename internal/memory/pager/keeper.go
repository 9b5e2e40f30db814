package pager

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"
)

// Keeper has a pager run for as long as it is wanted. The virtual machines of one that
// was killed hang until the next one ends them, so that comes at once.
type Keeper struct {
	socket string
	start  func(context.Context) (*Client, error)
	turn   chan struct{} // has a token while nobody starts a pager: two would be in each other's way
	wanted chan struct{} // has a token once somebody has asked for one

	ask     time.Duration // how often one that is there is asked whether it answers
	patient time.Duration // how long one that does not is waited for
}

// A pager that has not answered for so long, though it does nothing for that but run, is
// taken to hang, and its virtual machines with it.
const (
	askEvery = 10 * time.Second
	patience = time.Minute
)

// NewKeeper keeps the pager at socket, with start to connect to it and to start it if
// there is none.
func NewKeeper(socket string, start func(context.Context) (*Client, error)) *Keeper {
	k := &Keeper{socket: socket, start: start, turn: make(chan struct{}, 1), wanted: make(chan struct{}, 1), ask: askEvery, patient: patience}
	k.turn <- struct{}{}
	return k
}

// Connect connects to the pager, and starts it if there is none.
func (k *Keeper) Connect(ctx context.Context) (*Client, error) {
	select {
	case <-k.turn:
		defer func() { k.turn <- struct{}{} }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	c, err := k.start(ctx)
	select {
	case k.wanted <- struct{}{}:
	default:
	}
	return c, err
}

// A pager that ends as soon as it is started, or does not start, is not started again
// and again without a pause.
const (
	shortestLife = time.Second
	longestPause = time.Minute
)

// Watch starts a pager whenever there is none, until ctx ends: from the first Connect
// on, or at once where one has served virtual machines before. One that hangs is ended.
func (k *Keeper) Watch(ctx context.Context, log *slog.Logger) {
	if _, err := os.Stat(monitorsFile(k.socket)); err != nil {
		select {
		case <-k.wanted:
		case <-ctx.Done():
			return
		}
	}
	var silent time.Time // since when it does not answer; zero: it does, or there is none
	for wait := shortestLife; ctx.Err() == nil; {
		begin := time.Now()
		err := k.hold(ctx, &silent)
		if !errors.Is(err, errSilent) {
			silent = time.Time{}
		} else if silent.IsZero() {
			silent = time.Now()
		}
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, errSilent) && time.Since(silent) < k.patient:
			log.Warn("the pager does not answer", "for", time.Since(silent))
			continue
		case errors.Is(err, errSilent):
			log.Error("the pager hangs; it is ended, and with it the virtual machines that need it", "err", err)
			if err = k.end(ctx); err == nil {
				continue
			}
			log.Error("the pager cannot be ended", "err", err)
		case err != nil:
			log.Error("there is no pager: virtual machines that need it hang", "err", err)
		default:
			log.Error("the pager has ended, and with it the virtual machines that need it; another one is started")
		}
		if err == nil && time.Since(begin) > shortestLife {
			wait = shortestLife
			continue
		}
		if pause(ctx, wait) != nil {
			return
		}
		wait = min(2*wait, longestPause)
	}
}

// endLimit is how long a process that was killed may take to end.
const endLimit = 10 * time.Second

func (k *Keeper) end(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	return End(ctx, k.socket)
}

// hold returns when the pager has ended or does not answer, or ctx has ended. While it
// answers silent is zero.
func (k *Keeper) hold(ctx context.Context, silent *time.Time) error {
	c, err := k.Connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	ask := time.NewTicker(k.ask)
	defer ask.Stop()
	for {
		*silent = time.Time{}
		select {
		case <-c.Gone():
			return nil
		case <-ctx.Done():
			return nil
		case <-ask.C:
		}
		if _, err := c.hello(ctx, k.ask); errors.Is(err, errSilent) {
			return err
		}
	}
}
