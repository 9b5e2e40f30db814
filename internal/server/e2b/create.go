package e2b

import (
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/controlplane"
)

const (
	defaultTimeoutV1 = 15  // seconds
	defaultTimeoutV2 = 300 // seconds

	maxMetadata = 64 << 10 // bytes of all names and values together
	// maxVariable is what a kernel takes of NAME=VALUE and the NUL after it, in
	// bytes. With a longer one nothing could be started.
	maxVariable = 128 << 10
	allTraffic  = "0.0.0.0/0"
)

// newSandbox is the body of both create operations.
type newSandbox struct {
	TemplateID          string            `json:"templateID"`
	Timeout             *int64            `json:"timeout"`
	Metadata            map[string]string `json:"metadata"`
	EnvVars             map[string]string `json:"envVars"`
	Secure              *bool             `json:"secure"` // first generation only
	AllowInternetAccess *bool             `json:"allow_internet_access"`
	Network             *networkConfig    `json:"network"`
	AutoPause           *bool             `json:"autoPause"`
	AutoPauseMemory     *bool             `json:"autoPauseMemory"`
	AutoResume          *struct {
		Enabled bool `json:"enabled"`
	} `json:"autoResume"`
	Start string `json:"wrennStart"` // ours, for measurements; see the control plane's

	// Accepted at the value that asks for nothing.
	MCP          map[string]any                   `json:"mcp"`
	IAM          *struct{ Tokens map[string]any } `json:"iam"`
	VolumeMounts []struct{ Name, Path string }    `json:"volumeMounts"`
}

type networkConfig struct {
	AllowOut           []string       `json:"allowOut"`
	DenyOut            []string       `json:"denyOut"`
	AllowPublicTraffic *bool          `json:"allowPublicTraffic"`
	MaskRequestHost    string         `json:"maskRequestHost"`
	HTTPSPorts         []int64        `json:"httpsPorts"`
	EgressProxy        map[string]any `json:"egressProxy"`
	Rules              map[string]any `json:"rules"`
}

func (a *api) createV1(c *call) error {
	var body newSandbox
	if err := decodeRequired(c.r, &body); err != nil {
		return err
	}
	return a.create(c, body, defaultTimeoutV1, body.Secure != nil && *body.Secure)
}

func (a *api) createV2(c *call) error {
	var body newSandbox
	if err := decodeRequired(c.r, &body); err != nil {
		return err
	}
	return a.create(c, body, defaultTimeoutV2, true)
}

func (a *api) create(c *call, body newSandbox, defaultTimeout int64, secured bool) error {
	req, err := body.request(defaultTimeout, secured)
	if err != nil {
		return err
	}
	b, err := a.plane.Create(c.r.Context(), c.team.ID, req)
	if err != nil {
		return err
	}
	return writeJSON(c.w, http.StatusCreated, a.sandbox(b))
}

// request checks the body and turns it into what the control plane is asked for.
func (n newSandbox) request(defaultTimeout int64, secured bool) (controlplane.CreateRequest, error) {
	req := controlplane.CreateRequest{
		Template: n.TemplateID, Timeout: time.Duration(defaultTimeout) * time.Second,
		Metadata: n.Metadata, EnvVars: n.EnvVars, Secured: secured, AllowInternetAccess: true,
	}
	if n.TemplateID == "" {
		return req, invalid("templateID is missing")
	}
	switch req.Start = n.Start; req.Start {
	case "", "image", "boot":
	default:
		return req, invalid("wrennStart: want image or boot, got %q", clip(req.Start))
	}
	if n.Timeout != nil {
		if req.Timeout = seconds(*n.Timeout); req.Timeout <= 0 {
			return req, invalid("timeout must be greater than 0")
		}
	}
	if n.AllowInternetAccess != nil {
		req.AllowInternetAccess = *n.AllowInternetAccess
	}
	if err := n.checkPairs(); err != nil {
		return req, err
	}
	if err := n.checkServed(); err != nil {
		return req, err
	}
	if err := n.lifecycle(&req); err != nil {
		return req, err
	}
	if n.Network != nil {
		denyAll, err := n.Network.check()
		if err != nil {
			return req, err
		}
		req.AllowInternetAccess = req.AllowInternetAccess && !denyAll
		req.Protected = n.Network.AllowPublicTraffic != nil && !*n.Network.AllowPublicTraffic
		req.MaskRequestHost = n.Network.MaskRequestHost
	}
	return req, nil
}

func (n newSandbox) checkPairs() error {
	for name, value := range n.EnvVars {
		if name == "" || strings.ContainsAny(name, "=\x00") {
			return invalid("envVars: %q cannot be the name of an environment variable", clip(name))
		}
		if strings.Contains(value, "\x00") {
			return invalid("envVars: the value of %q holds a NUL character", clip(name))
		}
		if len(name)+len("=")+len(value)+len("\x00") > maxVariable {
			return invalid("envVars: %q is longer than %d bytes with its value", clip(name), maxVariable-2)
		}
	}
	size := 0
	for name, value := range n.Metadata {
		if size += len(name) + len(value); size > maxMetadata {
			return invalid("metadata: names and values are larger than %d bytes together", maxMetadata)
		}
		if strings.Contains(name+value, "\x00") {
			return invalid("metadata: %q holds a NUL character", clip(name))
		}
	}
	return nil
}

// lifecycle reads what is to happen at the end of the time to live and after it.
// autoResume alone is for a sandbox that is paused by request.
func (n newSandbox) lifecycle(req *controlplane.CreateRequest) error {
	req.AutoPause = n.AutoPause != nil && *n.AutoPause
	req.AutoPauseMemory = n.AutoPauseMemory == nil || *n.AutoPauseMemory
	req.AutoResume = n.AutoResume != nil && n.AutoResume.Enabled
	switch {
	case req.AutoPauseMemory:
		return nil
	case !req.AutoPause:
		return invalid("autoPauseMemory: false only applies when autoPause is true")
	case req.AutoResume:
		return invalid("autoPauseMemory: false cannot be combined with autoResume: without its memory a sandbox is woken only by connecting to it")
	}
	return nil
}

// checkServed refuses what would make another sandbox than the one asked for.
func (n newSandbox) checkServed() error {
	switch {
	case len(n.MCP) > 0:
		return notServed("mcp")
	case n.IAM != nil && len(n.IAM.Tokens) > 0:
		return notServed("iam")
	case len(n.VolumeMounts) > 0:
		return notServed("volumeMounts")
	}
	return nil
}

// check refuses network settings that are not served. Of those for the way out
// the one that is: to deny everything, which is the same as no access to the
// internet.
func (n networkConfig) check() (denyAll bool, err error) {
	denyAll = len(n.DenyOut) > 0 && !slices.ContainsFunc(n.DenyOut, func(s string) bool { return s != allTraffic })
	switch {
	case len(n.AllowOut) > 0:
		err = notServed("network.allowOut")
	case len(n.DenyOut) > 0 && !denyAll:
		err = notServed("network.denyOut of anything but " + allTraffic)
	case len(n.HTTPSPorts) > 0:
		err = notServed("network.httpsPorts")
	case len(n.EgressProxy) > 0:
		err = notServed("network.egressProxy")
	case len(n.Rules) > 0:
		err = notServed("network.rules")
	}
	return denyAll, err
}
