package e2b

import (
	"net/http"

	"github.com/wrenn/wrenn/internal/controlplane"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// platformMetrics serves the platform's own metrics. They name the sandboxes of all
// teams, so they are for the operator's team alone.
func (a *api) platformMetrics(c *call) error {
	if c.team.ID != controlplane.DefaultTeam {
		return sandbox.Errorf(sandbox.ErrForbidden, "the platform's metrics are for its operator: use the API key of the default team")
	}
	if a.platform == nil {
		return &statusError{status: http.StatusNotFound, message: "this platform has no metrics"}
	}
	a.platform.ServeHTTP(c.w, c.r)
	return nil
}
