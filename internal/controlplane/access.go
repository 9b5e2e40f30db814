package controlplane

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"time"

	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// MaxPreview is how long a preview link may hold.
const MaxPreview = 7 * 24 * time.Hour

// AccessToken is the token that envd of a sandbox wants where it is secured. It
// is derived, so that it can be shown to the owner again and is stored nowhere.
func (c *ControlPlane) AccessToken(id sandbox.ID) string {
	return hex.EncodeToString(c.derive("envd", id))
}

// agentToken is AccessToken where the sandbox is secured, else empty.
func (c *ControlPlane) agentToken(b sandbox.Sandbox) string {
	if !b.Spec.Secured {
		return ""
	}
	return c.AccessToken(b.ID)
}

// TrafficToken is the token that the other ports of a sandbox want where it is
// protected, derived as well.
func (c *ControlPlane) TrafficToken(id sandbox.ID) string {
	return hex.EncodeToString(c.derive("traffic", id))
}

// derive makes the secret of a sandbox that is for one purpose.
func (c *ControlPlane) derive(purpose string, id sandbox.ID) []byte {
	mac := hmac.New(sha256.New, c.cfg.MasterKey)
	mac.Write([]byte(purpose + ":" + string(id)))
	return mac.Sum(nil)
}

// target is what the data plane has to know of a running sandbox.
func (c *ControlPlane) target(b sandbox.Sandbox, addr netip.Addr) proxy.Target {
	return proxy.Target{SandboxID: string(b.ID), Addr: addr, Access: proxy.Access{
		Protected: b.Spec.Protected, Token: c.TrafficToken(b.ID),
		LinkKey: c.derive("preview-link", b.ID), MaskRequestHost: b.Spec.MaskRequestHost,
		AgentToken: c.agentToken(b),
	}}
}

// PreviewLink returns a preview link to a port of the team's running sandbox, and
// until when it holds: d from now, in whole seconds. It cannot be taken back but by
// ending the sandbox.
func (c *ControlPlane) PreviewLink(ctx context.Context, teamID string, id sandbox.ID, port int, d time.Duration) (string, time.Time, error) {
	switch {
	case port < 1 || port > 65535:
		return "", time.Time{}, sandbox.Errorf(sandbox.ErrInvalid, "port: want 1 to 65535")
	case port == proxy.AgentPort:
		return "", time.Time{}, sandbox.Errorf(sandbox.ErrInvalid, "port %d is the guest agent's, which wants the sandbox's access token: there are no preview links to it", port)
	case d < time.Second || d > MaxPreview:
		return "", time.Time{}, sandbox.Errorf(sandbox.ErrInvalid, "a preview link holds from 1 to %d seconds (%d days)", int64(MaxPreview/time.Second), MaxPreview/(24*time.Hour))
	}
	b, err := c.running(ctx, teamID, id)
	if err != nil {
		return "", time.Time{}, err
	}
	expires := time.Unix(time.Now().Add(d+time.Second-1).Unix(), 0) // rounded up: never less than asked for
	return proxy.SignLink(c.derive("preview-link", b.ID), string(b.ID), uint16(port), expires), expires, nil
}

// checkAccess checks what a request says of who may reach the sandbox.
func checkAccess(req CreateRequest) error {
	if req.Protected && !req.Secured {
		return sandbox.Errorf(sandbox.ErrInvalid, "a sandbox whose ports are protected has to be secured too: "+
			"otherwise its guest agent would let everybody in (secure: true)")
	}
	if req.MaskRequestHost != "" {
		return sandbox.CheckMaskRequestHost(req.MaskRequestHost)
	}
	return nil
}
