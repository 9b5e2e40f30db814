package e2b

import (
	"net/http"

	"github.com/wrenn/wrenn/internal/controlplane"
)

const (
	mostForks = 100

	defaultTimeoutResume = 15 // seconds
	defaultTimeoutFork   = 15 // seconds
)

// connectRequest asks for a sandbox to be running. Memory says how a paused one
// is to be resumed and means nothing to one that runs.
type connectRequest struct {
	Timeout *int64 `json:"timeout"`
	Memory  *bool  `json:"memory"`
}

func (a *api) connectV1(c *call) error {
	var body connectRequest
	if err := decodeRequired(c.r, &body); err != nil {
		return err
	}
	if body.Timeout == nil {
		return invalid("timeout is missing")
	}
	return a.connect(c, *body.Timeout, body.Memory)
}

func (a *api) connectV2(c *call) error {
	var body connectRequest
	if _, err := decode(c.r, &body); err != nil {
		return err
	}
	return a.connect(c, or(body.Timeout, defaultTimeoutV2), body.Memory)
}

func (a *api) connect(c *call, timeout int64, memory *bool) error {
	id, err := c.sandboxID()
	if err != nil {
		return err
	}
	b, resumed, err := a.plane.Connect(c.r.Context(), c.team.ID, id, controlplane.ConnectRequest{Timeout: seconds(timeout), Memory: memory})
	if err != nil {
		return err
	}
	status := http.StatusOK
	if resumed {
		status = http.StatusCreated
	}
	return writeJSON(c.w, status, a.sandbox(b))
}

// resume is connect's predecessor: it wants the sandbox to be paused.
func (a *api) resume(c *call) error {
	id, err := c.sandboxID()
	if err != nil {
		return err
	}
	var body struct {
		Timeout   *int64 `json:"timeout"`
		AutoPause *bool  `json:"autoPause"`
		Memory    *bool  `json:"memory"`
	}
	if _, err := decode(c.r, &body); err != nil {
		return err
	}
	b, err := a.plane.Resume(c.r.Context(), c.team.ID, id, controlplane.ResumeRequest{
		Timeout: seconds(or(body.Timeout, defaultTimeoutResume)), AutoPause: body.AutoPause, Memory: body.Memory,
	})
	if err != nil {
		return err
	}
	return writeJSON(c.w, http.StatusCreated, a.sandbox(b))
}

func (a *api) pause(c *call) error {
	id, err := c.sandboxID()
	if err != nil {
		return err
	}
	var body struct {
		Memory *bool `json:"memory"`
	}
	if _, err := decode(c.r, &body); err != nil {
		return err
	}
	if err := a.plane.Pause(c.r.Context(), c.team.ID, id, or(body.Memory, true)); err != nil {
		return err
	}
	return noContent(c.w)
}

// forkResult has one of the two.
type forkResult struct {
	Sandbox *sandboxResponse `json:"sandbox,omitempty"`
	Error   *apiError        `json:"error,omitempty"`
}

func (a *api) fork(c *call) error {
	id, err := c.sandboxID()
	if err != nil {
		return err
	}
	var body struct {
		Timeout *int64 `json:"timeout"`
		Count   *int64 `json:"count"`
	}
	if _, err := decode(c.r, &body); err != nil {
		return err
	}
	count := or(body.Count, 1)
	if count < 1 || count > mostForks {
		return invalid("count: want a number from 1 to %d", mostForks)
	}
	forks, err := a.plane.Fork(c.r.Context(), c.team.ID, id, int(count), seconds(or(body.Timeout, defaultTimeoutFork)))
	if err != nil {
		return err
	}
	results := make([]forkResult, len(forks))
	for i, f := range forks {
		if f.Err != nil {
			failure := a.failure(c.r, f.Err)
			results[i].Error = &failure
			continue
		}
		box := a.sandbox(f.Sandbox)
		results[i].Sandbox = &box
	}
	return writeJSON(c.w, http.StatusCreated, results)
}

// or is what p points to, or fallback when it is nil.
func or[T any](p *T, fallback T) T {
	if p == nil {
		return fallback
	}
	return *p
}
