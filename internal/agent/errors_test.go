package agent

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/sandbox"
)

func TestCausesAreLoggedAndNotTold(t *testing.T) {
	var log strings.Builder
	a := &Agent{log: slog.New(slog.NewTextHandler(&log, nil))}
	call := a.logCauses(func(context.Context, connect.AnyRequest) (connect.AnyResponse, error) {
		return nil, rpcError(&sandbox.Error{Kind: sandbox.ErrExhausted, Message: "the host's disk is full", Cause: errors.New("measured at /srv/data")})
	})
	_, err := call(t.Context(), connect.NewRequest(&hostagent.PauseSandboxRequest{}))
	var told *connect.Error
	if !errors.As(err, &told) || told.Code() != connect.CodeResourceExhausted || told.Message() != "the host's disk is full" {
		t.Errorf("told: %v", err)
	}
	if !strings.Contains(log.String(), "/srv/data") {
		t.Errorf("log: %q", log.String())
	}
}
