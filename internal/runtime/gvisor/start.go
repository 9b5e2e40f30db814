package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/wrenn/wrenn/internal/process"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/life"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Create implements runtime.Runtime.
func (r *Runtime) Create(ctx context.Context, cfg runtime.Config) (runtime.Instance, error) {
	if err := check(cfg); err != nil {
		return nil, err
	}
	inst, err := r.start(ctx, cfg, nil)
	if err != nil {
		return nil, fmt.Errorf("create sandbox %s: %w", cfg.ID, err)
	}
	return inst, nil
}

// Restore implements runtime.Runtime.
func (r *Runtime) Restore(ctx context.Context, cfg runtime.Config, image runtime.Image) (runtime.Instance, error) {
	if err := check(cfg); err != nil {
		return nil, err
	}
	if !filepath.IsAbs(image.Dir) {
		return nil, fmt.Errorf("path %q is not absolute", image.Dir)
	}
	inst, err := r.start(ctx, cfg, &image)
	if err != nil {
		return nil, fmt.Errorf("restore sandbox %s: %w", cfg.ID, err)
	}
	return inst, nil
}

// start makes an instance, from an image unless that is nil. When it fails,
// nothing is left.
func (r *Runtime) start(ctx context.Context, cfg runtime.Config, image *runtime.Image) (*instance, error) {
	if err := r.set.Claim(cfg.ID); err != nil {
		return nil, err
	}
	defer r.set.Release(cfg.ID)
	if _, err := os.Lstat(stateFile(r.cfg.Root, cfg.ID)); err == nil {
		return nil, life.InUse(cfg.ID)
	}
	inst, err := r.launch(ctx, cfg, image)
	if err != nil {
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), life.FreeTime)
		defer cancel()
		if ferr := free(cleanup, r.set, r.cfg.Root, cfg.ID, cfg.Dir); ferr != nil {
			r.cfg.Log.Error("failed start left something", "sandbox", cfg.ID, "err", ferr)
		}
		return nil, err
	}
	return inst, nil
}

// check refuses what runsc would take and misunderstand.
func check(cfg runtime.Config) error {
	if err := cfg.Check(); err != nil {
		return err
	}
	if cfg.Slot == nil {
		return sandbox.Errorf(sandbox.ErrInvalid, "a sandbox needs a network slot")
	}
	if _, err := os.Stat(cfg.GuestInit); err != nil {
		return fmt.Errorf("open guest agent: %w", err)
	}
	return nil
}

// launch runs the commands that make the instance.
func (r *Runtime) launch(ctx context.Context, cfg runtime.Config, image *runtime.Image) (*instance, error) {
	init, err := os.Stat(cfg.GuestInit)
	if err != nil {
		return nil, fmt.Errorf("open guest agent: %w", err)
	}
	var m manifest
	if image != nil {
		if m, err = checkImage(*image, r.version, init.Size()); err != nil {
			return nil, err
		}
	}
	if err := writeBundle(cfg, r.set.Group(cfg.ID), image == nil); err != nil {
		return nil, err
	}
	if image == nil {
		err = r.runsc(ctx, cfg, "run", "--detach", "--bundle="+cfg.Dir)
	} else {
		err = r.load(ctx, cfg, *image, m)
	}
	if err != nil {
		return nil, err
	}
	if err := r.settleMemory(cfg.ID, cfg.Resources.MemoryMiB); err != nil {
		return nil, err
	}
	st, err := r.identify(cfg, init.Size())
	if err != nil {
		return nil, err
	}
	inst, err := r.open(cfg.ID, st)
	if errors.Is(err, os.ErrProcessDone) {
		return nil, fmt.Errorf("the sandbox ended at once: %s", ending(cfg.Dir, 0, false))
	}
	return inst, err
}

// runsc runs one command of runsc's on the instance.
func (r *Runtime) runsc(ctx context.Context, cfg runtime.Config, command ...string) error {
	args := append(engineFlags(r.cfg.Root, cfg.Dir, cfg.Resources.DiskMiB), command...)
	return r.exec(ctx, filepath.Join(cfg.Dir, logFile), append(args, string(cfg.ID)))
}

// runscState is what runsc knows of a container, as far as it matters here.
type runscState struct {
	GoferPID int `json:"goferPid"`
	Sandbox  struct {
		PID               int    `json:"pid"`
		ControlSocketPath string `json:"controlSocketPath"`
	} `json:"sandbox"`
}

func readRunscState(root string, id sandbox.ID) (runscState, error) {
	var rs runscState
	data, err := os.ReadFile(stateFile(root, id))
	if err == nil {
		err = json.Unmarshal(data, &rs)
	}
	if err != nil {
		return rs, fmt.Errorf("read runsc's state: %w", err)
	}
	return rs, nil
}

// identify records the processes that runsc started.
func (r *Runtime) identify(cfg runtime.Config, initSize int64) (state, error) {
	rs, err := readRunscState(r.cfg.Root, cfg.ID)
	if err != nil {
		return state{}, err
	}
	res := cfg.Resources
	st := state{Dir: cfg.Dir, MemoryMiB: res.MemoryMiB, DiskMiB: res.DiskMiB, PIDs: res.PIDs, Version: r.version, Init: initSize}
	// A process that has ended already is left zero; opening it says so.
	st.Engine, _ = process.Identify(rs.Sandbox.PID)
	st.Gofer, _ = process.Identify(rs.GoferPID)
	return st, nil
}
