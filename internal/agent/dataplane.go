package agent

import (
	"context"

	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// DataPlane carries requests of fronts on other hosts to the ports of this host's
// sandboxes: /proxy/{id}/{port}/… over HTTP/1.1, and HTTP/2 for gRPC. Nobody but
// fronts may reach it: they have checked who is asking. A front in the same process
// goes to the sandbox itself.
func (a *Agent) DataPlane() *proxy.Proxy { return a.data }

// guests resolves the sandboxes of an agent for its data plane.
type guests struct{ *Agent }

// Resolve implements proxy.Resolver.
func (g guests) Resolve(_ context.Context, id string) (proxy.Target, error) {
	if m := g.get(sandbox.ID(id)); m != nil {
		if rec, addr, _ := m.status(); rec.State == sandbox.Running && addr.IsValid() {
			return proxy.Target{SandboxID: id, Addr: addr}, nil
		}
	}
	return proxy.Target{}, sandbox.Errorf(sandbox.ErrNotFound, "sandbox %q does not run on this host", id)
}
