package main

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/wrenn/wrenn/internal/client"
)

// runPython runs a line of Python in a sandbox of its own on the platform of
// dir, as a user would, and returns what it printed.
func runPython(ctx context.Context, dir dataDir, code string) (output string, creds client.Credentials, err error) {
	if creds, err = client.LoadCredentials(dir.credentials()); err != nil {
		return "", creds, err
	}
	c, err := client.New(client.Config{APIURL: creds.APIURL, SandboxURL: creds.SandboxURL, APIKey: creds.APIKey})
	if err != nil {
		return "", creds, err
	}
	defer c.Close()
	info, err := c.Create(ctx, client.CreateRequest{TemplateID: "base", Timeout: time.Minute})
	if err != nil {
		return "", creds, fmt.Errorf("create sandbox: %w", err)
	}
	defer func() {
		if kerr := c.Kill(context.WithoutCancel(ctx), info.SandboxID); err == nil {
			err = kerr
		}
	}()
	p, err := c.Sandbox(info).Start(ctx, client.Command{Path: "python3", Args: []string{"-c", code}})
	if err != nil {
		return "", creds, fmt.Errorf("start python3: %w", err)
	}
	defer p.Close()
	var stdout, stderr bytes.Buffer
	exit, err := p.Wait(&stdout, &stderr)
	if err != nil {
		return "", creds, fmt.Errorf("run python3: %w", err)
	}
	if exit.Status() != 0 {
		return "", creds, fmt.Errorf("python3 ended with status %d: %s", exit.Status(), stderr.String())
	}
	return stdout.String(), creds, nil
}
