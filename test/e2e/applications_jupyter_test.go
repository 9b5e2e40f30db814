package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/coder/websocket/wsjson"
)

var jupyterLab = application{"jupyter", "python3 -m venv venv && venv/bin/pip install -q -r requirements.txt"}

// A notebook's output comes over a WebSocket while the page keeps asking the REST
// API how things are.
func TestJupyterLab(t *testing.T) {
	w := startWeb(t, jupyterLab.rootfs(t))
	b := w.create(map[string]any{"timeout": 900})
	lab := func(address string, port int) string {
		return asUser("jupyter", fmt.Sprintf("venv/bin/jupyter lab --no-browser --ip=%s --port=%d --IdentityProvider.token=secret --ServerApp.allow_remote_access=True", address, port))
	}
	w.serve(t, b, 8888, "api", lab("127.0.0.1", 8888))
	w.serve(t, b, 8889, "api", lab("0.0.0.0", 8889))
	// The page of Lab does not fit below a prefix, its API does.
	loopback, everywhere := w.forms(b, 8888), w.forms(b, 8889)
	for name, f := range map[string]form{
		"on the loopback, host":          loopback[0],
		"on the loopback, host over TLS": loopback[1],
		"on all addresses, path":         everywhere[2],
	} {
		t.Run(name, func(t *testing.T) {
			(&notebook{t, f.url, w.client(t, true), w.client(t, false)}).runsACellWhilePolled()
		})
	}
	t.Run("browser", func(t *testing.T) {
		w.browse(t, b, "jupyter.browser.mjs", map[string][]form{"jupyter": loopback})
	})
}

// notebook is a Jupyter server as the page of Lab uses it.
type notebook struct {
	t            *testing.T
	url          string
	rest, socket *http.Client
}

func (n *notebook) runsACellWhilePolled() {
	ctx, cancel := context.WithTimeout(n.t.Context(), 2*time.Minute)
	defer cancel()
	var kernel struct{ ID string }
	if err := n.api(ctx, "POST", "api/kernels", &kernel); err != nil {
		n.t.Fatal(err)
	}
	defer n.api(context.WithoutCancel(ctx), "DELETE", "api/kernels/"+kernel.ID, nil)
	c, _, err := websocket.Dial(ctx, n.url+"api/kernels/"+kernel.ID+"/channels", &websocket.DialOptions{
		HTTPClient: n.socket, HTTPHeader: http.Header{"Authorization": {"token secret"}},
	})
	if err != nil {
		n.t.Fatal(err)
	}
	defer c.CloseNow()
	c.SetReadLimit(-1)

	polling, stop := context.WithCancel(ctx)
	polled := make(chan int)
	go func() { polled <- n.poll(polling, "api/kernels/"+kernel.ID) }()

	const lines = 30
	first, last := n.execute(ctx, c, fmt.Sprintf("import time\nfor i in range(%d):\n    print('line', i, flush=True)\n    time.sleep(0.1)", lines), lines)
	stop()
	polls := <-polled
	if spread := last.Sub(first); spread < 2*time.Second {
		n.t.Errorf("what the cell printed in 3 s came within %s", spread)
	}
	if polls < 20 {
		n.t.Errorf("the API answered %d times meanwhile", polls)
	}
	if err := c.Close(websocket.StatusNormalClosure, ""); err != nil {
		n.t.Errorf("close: %v", err)
	}
}

// execute runs code, checks that it prints its lines in order, and tells when the
// first and the last output came.
func (n *notebook) execute(ctx context.Context, c *websocket.Conn, code string, lines int) (first, last time.Time) {
	type header map[string]any
	request := map[string]any{
		"channel":       "shell",
		"header":        header{"msg_id": "run", "msg_type": "execute_request", "session": "test", "username": "", "version": "5.3"},
		"parent_header": header{}, "metadata": header{},
		"content": header{"code": code, "silent": false, "store_history": true, "user_expressions": header{}, "allow_stdin": false, "stop_on_error": true},
	}
	if err := wsjson.Write(ctx, c, request); err != nil {
		n.t.Fatal(err)
	}
	var printed strings.Builder
	replied, idle := false, false
	for !replied || !idle {
		var m struct {
			Header struct {
				Type string `json:"msg_type"`
			}
			Parent struct {
				ID string `json:"msg_id"`
			} `json:"parent_header"`
			Content struct {
				Text   string
				Status string
				State  string `json:"execution_state"`
			}
		}
		if err := wsjson.Read(ctx, c, &m); err != nil {
			n.t.Fatalf("after %q: %v", printed.String(), err)
		}
		if m.Parent.ID != "run" {
			continue
		}
		switch m.Header.Type {
		case "stream":
			printed.WriteString(m.Content.Text)
			last = time.Now()
			if first.IsZero() {
				first = last
			}
		case "execute_reply":
			replied = true
			if m.Content.Status != "ok" {
				n.t.Errorf("the cell ended with %q", m.Content.Status)
			}
		case "status":
			idle = m.Content.State == "idle"
		}
	}
	var want strings.Builder
	for i := range lines {
		fmt.Fprintf(&want, "line %d\n", i)
	}
	if printed.String() != want.String() {
		n.t.Errorf("the cell printed\n%s", printed.String())
	}
	return first, last
}

// poll asks for path 20 times a second until ctx ends, and returns how many answers
// came; every one must be good.
func (n *notebook) poll(ctx context.Context, path string) (answers int) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return answers
		case <-tick.C:
		}
		err := n.api(ctx, "GET", path, new(map[string]any))
		if ctx.Err() != nil {
			return answers
		}
		if err != nil {
			n.t.Error(err)
		}
		answers++
	}
}

func (n *notebook) api(ctx context.Context, method, path string, answer any) error {
	req, err := http.NewRequestWithContext(ctx, method, n.url+path, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "token secret")
	res, err := n.rest.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, res.Status, body)
	}
	if answer != nil {
		err = errors.Join(err, json.Unmarshal(body, answer))
	}
	return err
}
