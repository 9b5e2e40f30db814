package bench

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// child is a program that runs until it is stopped.
type child struct {
	cmd    *exec.Cmd
	cancel context.CancelFunc
	ended  chan struct{} // closed when it has ended and err is set
	err    error
	stderr bytes.Buffer // to be read after the end
}

// newChild prepares a program that end tells to end.
func newChild(ctx context.Context, end func(*exec.Cmd) error, path string, args ...string) *child {
	c := &child{ended: make(chan struct{})}
	ctx, c.cancel = context.WithCancel(ctx)
	c.cmd = exec.CommandContext(ctx, path, args...)
	c.cmd.Cancel = func() error { return end(c.cmd) }
	c.cmd.WaitDelay = 10 * time.Second
	c.cmd.Stderr = &c.stderr
	// An agent must not be left behind, whatever becomes of us: it runs what it is told.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c
}

func (c *child) start() error {
	if err := c.cmd.Start(); err != nil {
		c.cancel()
		return err
	}
	go func() {
		defer close(c.ended)
		err := c.cmd.Wait()
		if err != nil && !errors.Is(err, context.Canceled) {
			c.err = fmt.Errorf("%s: %w: %s", c.cmd.Path, err, bytes.TrimSpace(c.stderr.Bytes()))
		}
	}()
	return nil
}

// stop ends it; the error says that it had ended before, or failed to.
func (c *child) stop() error {
	select {
	case <-c.ended:
		return fmt.Errorf("%s ended by itself: %w", c.cmd.Path, c.err)
	default:
	}
	c.cancel()
	<-c.ended
	return c.err
}

// pipedChild is a child that prints a line when it is ready, and ends when its
// standard input does.
type pipedChild struct {
	*child
	pipe *os.File
	out  *bufio.Reader // of pipe
}

// startPiped starts a command with arguments added to it, gives it order as its
// first line of input, and returns the line that it prints when it is ready.
func startPiped(ctx context.Context, order []byte, command []string, args ...string) (_ *pipedChild, ready string, err error) {
	var stdin io.WriteCloser
	closeStdin := func(*exec.Cmd) error { return stdin.Close() }
	c := &pipedChild{child: newChild(ctx, closeStdin, command[0], append(command[1:len(command):len(command)], args...)...)}
	if stdin, err = c.cmd.StdinPipe(); err != nil {
		return nil, "", err
	}
	var write *os.File
	if c.pipe, write, err = os.Pipe(); err != nil {
		return nil, "", err
	}
	c.out = bufio.NewReader(c.pipe)
	c.cmd.Stdout = write
	err = c.start()
	write.Close()
	if err != nil {
		c.pipe.Close()
		return nil, "", err
	}
	_, err = stdin.Write(order)
	if err == nil {
		ready, err = c.out.ReadString('\n')
	}
	if err != nil {
		_, ended := c.stop()
		return nil, "", errors.Join(fmt.Errorf("%s does not get ready: %w", c.cmd.Path, err), ended)
	}
	return c, strings.TrimSpace(ready), nil
}

// stop ends it and returns what it printed after it was ready.
func (c *pipedChild) stop() (last []byte, err error) {
	defer c.pipe.Close()
	if err := c.child.stop(); err != nil {
		return nil, err
	}
	return io.ReadAll(c.out)
}
