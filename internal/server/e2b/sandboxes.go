package e2b

import (
	"net/http"
	"slices"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// clientID stands where E2B once named the machine of a sandbox. Clients want it
// to be there, and old ones make "{sandbox id}-{client id}" of it.
const clientID = "00000000"

// sandboxResponse is what create and connect answer.
type sandboxResponse struct {
	TemplateID         string  `json:"templateID"`
	SandboxID          string  `json:"sandboxID"`
	Alias              string  `json:"alias,omitempty"`
	ClientID           string  `json:"clientID"`
	EnvdVersion        string  `json:"envdVersion"`
	EnvdAccessToken    string  `json:"envdAccessToken,omitempty"`
	TrafficAccessToken string  `json:"trafficAccessToken,omitempty"`
	Domain             *string `json:"domain"` // null: the client's own
}

// listedSandbox is an element of a list.
type listedSandbox struct {
	TemplateID  string            `json:"templateID"`
	SandboxID   string            `json:"sandboxID"`
	Alias       string            `json:"alias,omitempty"`
	ClientID    string            `json:"clientID"`
	StartedAt   time.Time         `json:"startedAt"`
	EndAt       time.Time         `json:"endAt"`
	CPUCount    int               `json:"cpuCount"`
	MemoryMB    int64             `json:"memoryMB"`
	DiskSizeMB  int64             `json:"diskSizeMB"`
	Metadata    map[string]string `json:"metadata"`
	State       string            `json:"state"`
	EnvdVersion string            `json:"envdVersion"`
}

// sandboxDetail is what get answers.
type sandboxDetail struct {
	listedSandbox
	EnvdAccessToken     string        `json:"envdAccessToken,omitempty"`
	TrafficAccessToken  string        `json:"trafficAccessToken,omitempty"`
	Domain              *string       `json:"domain"`
	AllowInternetAccess bool          `json:"allowInternetAccess"`
	Network             networkDetail `json:"network"`
	Lifecycle           lifecycle     `json:"lifecycle"`
}

// networkDetail is what a sandbox was created with, defaults filled in.
type networkDetail struct {
	DenyOut            []string `json:"denyOut,omitempty"`
	AllowPublicTraffic bool     `json:"allowPublicTraffic"`
	MaskRequestHost    string   `json:"maskRequestHost,omitempty"`
}

type lifecycle struct {
	AutoResume bool   `json:"autoResume"`
	OnTimeout  string `json:"onTimeout"` // kill or pause
}

func (a *api) sandbox(b sandbox.Sandbox) sandboxResponse {
	return sandboxResponse{
		TemplateID: templateOf(b), SandboxID: string(b.ID), Alias: b.Alias, ClientID: clientID,
		EnvdVersion: a.envdVersionOf(b), EnvdAccessToken: a.accessToken(b), TrafficAccessToken: a.trafficToken(b),
		Domain: a.domainOrNull(),
	}
}

func (a *api) listed(b sandbox.Sandbox) listedSandbox {
	started, ends, state, metadata := b.Started, b.Ends, "running", b.Spec.Metadata
	if started.IsZero() {
		started = b.Created
	}
	if slices.Contains(pausedStates, b.State) {
		state, ends = "paused", b.Changed
	}
	if metadata == nil {
		metadata = map[string]string{}
	}
	return listedSandbox{
		TemplateID: templateOf(b), SandboxID: string(b.ID), Alias: b.Alias, ClientID: clientID,
		StartedAt: timestamp(started), EndAt: timestamp(ends), Metadata: metadata,
		CPUCount: b.Spec.Resources.CPUs, MemoryMB: b.Spec.Resources.MemoryMiB, DiskSizeMB: b.Spec.Resources.DiskMiB,
		State: state, EnvdVersion: a.envdVersionOf(b),
	}
}

// templateOf names what the sandbox was created from: a snapshot is a template to
// E2B's clients.
func templateOf(b sandbox.Sandbox) string {
	if b.Spec.SnapshotID != "" {
		return b.Spec.SnapshotID
	}
	return b.Spec.TemplateID
}

func lifecycleOf(b sandbox.Sandbox) lifecycle {
	l := lifecycle{AutoResume: b.Spec.AutoResume, OnTimeout: "kill"}
	if b.Spec.AutoPause {
		l.OnTimeout = "pause"
	}
	return l
}

// timestamp cuts a time to what clients in Python and JavaScript can read.
func timestamp(t time.Time) time.Time { return t.UTC().Truncate(time.Microsecond) }

func (a *api) envdVersionOf(b sandbox.Sandbox) string {
	if b.EnvdVersion != "" {
		return b.EnvdVersion
	}
	return a.envdVersion
}

func (a *api) accessToken(b sandbox.Sandbox) string {
	if !b.Spec.Secured {
		return ""
	}
	return a.plane.AccessToken(b.ID)
}

func (a *api) trafficToken(b sandbox.Sandbox) string {
	if !b.Spec.Protected {
		return ""
	}
	return a.plane.TrafficToken(b.ID)
}

func networkOf(b sandbox.Sandbox) networkDetail {
	n := networkDetail{AllowPublicTraffic: !b.Spec.Protected, MaskRequestHost: b.Spec.MaskRequestHost}
	if !b.Spec.AllowInternetAccess {
		n.DenyOut = []string{allTraffic}
	}
	return n
}

func (a *api) domainOrNull() *string {
	if a.domain == "" {
		return nil
	}
	return &a.domain
}

func (a *api) get(c *call) error {
	id, err := c.sandboxID()
	if err != nil {
		return err
	}
	b, err := a.plane.Get(c.r.Context(), c.team.ID, id)
	if err != nil {
		return err
	}
	return writeJSON(c.w, http.StatusOK, sandboxDetail{
		listedSandbox: a.listed(b), EnvdAccessToken: a.accessToken(b), TrafficAccessToken: a.trafficToken(b), Domain: a.domainOrNull(),
		AllowInternetAccess: b.Spec.AllowInternetAccess, Network: networkOf(b), Lifecycle: lifecycleOf(b),
	})
}

func (a *api) kill(c *call) error {
	id, err := c.sandboxID()
	if err != nil {
		return err
	}
	if err := a.plane.Kill(c.r.Context(), c.team.ID, id); err != nil {
		return err
	}
	return noContent(c.w)
}

func (a *api) setTimeout(c *call) error {
	id, err := c.sandboxID()
	if err != nil {
		return err
	}
	var body struct {
		Timeout *int64 `json:"timeout"`
	}
	if err := decodeRequired(c.r, &body); err != nil {
		return err
	}
	if body.Timeout == nil || *body.Timeout < 0 {
		return invalid("timeout: want a number of seconds, 0 or more")
	}
	if err := a.plane.SetTimeout(c.r.Context(), c.team.ID, id, seconds(*body.Timeout)); err != nil {
		return err
	}
	return noContent(c.w)
}

const (
	leastRefresh = 15   // seconds; also the default
	mostRefresh  = 3600 // seconds
)

func (a *api) refresh(c *call) error {
	id, err := c.sandboxID()
	if err != nil {
		return err
	}
	var body struct {
		Duration *int64 `json:"duration"`
	}
	if _, err := decode(c.r, &body); err != nil {
		return err
	}
	duration := int64(leastRefresh)
	if body.Duration != nil {
		if *body.Duration < 0 || *body.Duration > mostRefresh {
			return invalid("duration: want a number of seconds from 0 to %d", mostRefresh)
		}
		duration = max(duration, *body.Duration)
	}
	if err := a.plane.Refresh(c.r.Context(), c.team.ID, id, seconds(duration)); err != nil {
		return err
	}
	return noContent(c.w)
}
