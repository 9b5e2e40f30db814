package pager

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// End ends the pager at socket, if there is one, and returns when it has ended. The
// virtual machines that it serves end with it.
func End(ctx context.Context, socket string) error {
	if err := end(ctx, socket); err != nil {
		return fmt.Errorf("end pager: %w", err)
	}
	return nil
}

func end(ctx context.Context, socket string) error {
	conn, err := dial(ctx, socket)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return nil
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	h, err := peer(conn, 0)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer h.Close()
	return h.End(ctx)
}
