package envd

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/wrenn/wrenn/api/proto/process/processconnect"
	"github.com/wrenn/wrenn/internal/envd/cgroup"
	"github.com/wrenn/wrenn/internal/envd/reserve"
)

// Variables of the agent's own environment, with which the runtime tells what the
// sandbox's kernel leaves to the agent.
const (
	// tasksVariable is the most processes and threads that the sandbox's programs
	// may have all together.
	tasksVariable = "ENVD_MAX_TASKS"
	// oomVariable is "1" where the kernel does not kill processes when memory runs
	// out, but ends with all of them.
	oomVariable = "ENVD_KILL_WHEN_OUT_OF_MEMORY"
)

// limitPrograms keeps the programs of the sandbox from taking what it cannot do
// without, as the runtime has asked for, until ctx ends. It calls serve meanwhile.
func (a *Agent) limitPrograms(ctx context.Context, serve func(http.Handler) error) error {
	root, err := cgroup.Find()
	users := filepath.Join(root, "user")
	if err == nil {
		_, err = os.Stat(users)
	}
	if err != nil {
		return serve(a.handler)
	}
	if most, err := strconv.Atoi(os.Getenv(tasksVariable)); err == nil && most > 0 {
		if err := reserve.LimitTasks(users, most); err != nil {
			a.log.Warn("processes are not limited", "error", err)
		}
	}
	if os.Getenv(oomVariable) != "1" {
		return serve(a.handler)
	}
	killer, err := reserve.NewOOMKiller(users, a.log)
	if err != nil {
		a.log.Warn("memory is not watched", "error", err)
		return serve(a.handler)
	}
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		killer.Run(ctx)
	}()
	defer func() {
		stop()
		<-ended
	}()
	return serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, processconnect.ProcessStartProcedure) {
			killer.Wake()
		}
		a.handler.ServeHTTP(w, r)
	}))
}
