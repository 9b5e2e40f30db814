package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// startInProcess runs a part of the benchmark that talks over its standard input
// and output, and returns the line that it prints when it is ready. end ends it
// and reads what it printed last.
func startInProcess(t *testing.T, run func(in io.Reader, out io.Writer) error, order any) (ready string, end func(last any)) {
	t.Helper()
	in, orders := io.Pipe()
	answers, out := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := run(in, out)
		out.Close()
		ended <- err
	}()
	t.Cleanup(func() { orders.Close(); answers.Close() })
	if order != nil {
		line, err := json.Marshal(order)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := orders.Write(append(line, '\n')); err != nil {
			t.Fatal(err)
		}
	}
	lines := bufio.NewReader(answers)
	ready, err := lines.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(ready), func(last any) {
		t.Helper()
		orders.Close()
		if err := json.NewDecoder(lines).Decode(last); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

func TestTheLoadOfTheTerminalBenchmarkIsReal(t *testing.T) {
	app := func(t *testing.T) string {
		server := httptest.NewUnstartedServer(terminalApp())
		server.Config.Protocols = new(http.Protocols)
		server.Config.Protocols.SetHTTP1(true)
		server.Config.Protocols.SetUnencryptedHTTP2(true)
		server.Start()
		t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
		return server.URL
	}
	t.Run("directly", func(t *testing.T) {
		t.Parallel()
		checkLoad(t, loadOrder{URL: app(t), Upgrade: true})
	})
	t.Run("over one connection", func(t *testing.T) {
		t.Parallel()
		target := app(t)
		url, end := startInProcess(t, func(in io.Reader, out io.Writer) error {
			return ServeTerminalRelay(in, out, target, 0)
		}, nil)
		checkLoad(t, loadOrder{URL: url})
		var relayed relayReport
		if end(&relayed); relayed.Connections != 1 {
			t.Errorf("the relay made %d connections", relayed.Connections)
		}
	})
}

// checkLoad runs a load for a second.
func checkLoad(t *testing.T, order loadOrder) {
	t.Helper()
	order.Sockets, order.Polls, order.Downloads, order.Uploads, order.Stalled = 2, 20, 2, 1, 5
	order.Limit, order.Rate = 1, 8*mebibyte
	_, end := startInProcess(t, RunTerminalLoad, order)
	time.Sleep(time.Second) // of load
	var r loadReport
	end(&r)
	if r.Errors > 0 || r.Seconds < 1 {
		t.Errorf("%+v", r)
	}
	if r.Messages < 10 || r.Polls < 3 || r.Down < mebibyte/4 || r.Up < mebibyte/16 {
		t.Errorf("hardly any load: %+v", r)
	}
	// Downloads that are slowed down may have stopped for the moment, too.
	if r.Flowing != 2+1+2+1+5 || r.Blocked < 5 || r.Blocked > 5+2 {
		t.Errorf("%d connections flow, %d downloads have stopped", r.Flowing, r.Blocked)
	}
}

func TestGovernorSlowsTransfersOnlyWhileTheMachineIsBusy(t *testing.T) {
	for limit, want := range map[float64]string{1e-9: "slower", 1000: "faster"} {
		moved := int64(0)
		g := newGovernor(limit, 64*mebibyte, func() int64 { moved += 1 << 30; return moved })
		ctx, cancel := context.WithTimeout(t.Context(), 3*governorTick)
		defer cancel()
		if err := g.run(ctx); err != nil {
			t.Fatal(err)
		}
		if faster := g.limiter.Limit() > 64*mebibyte; faster != (want == "faster") {
			t.Errorf("limit %v: %v bytes per second, want %s", limit, g.limiter.Limit(), want)
		}
	}
}

func TestKeysThatAreLostCountAsLongAsTheyWereWaitedFor(t *testing.T) {
	b := runningEnvd(t)
	for _, script := range []string{"exec cat", "exec sleep 60"} {
		terminal, err := b.agent.wire.openTerminal(t.Context(), command(b.dir, "/bin/sh", "-c", "stty raw -echo; printf '\\000'; "+script))
		if err != nil {
			t.Fatal(err)
		}
		defer terminal.close()
		if err := terminal.await(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		var m typed
		if err := m.measure(t.Context(), terminal, 30, 2*time.Second); err != nil {
			t.Fatal(err)
		}
		switch {
		case script == "exec cat" && (m.lost > 0 || len(m.samples) != 30 || m.quantile(1) >= 2000):
			t.Errorf("a terminal that echoes: %+v", m)
		case script != "exec cat" && (m.lost != keysToGiveUp || len(m.samples) != keysToGiveUp || m.quantile(.01) != 2000):
			t.Errorf("a terminal that does not echo: %+v", m)
		}
	}
}

func TestTerminalIsJudgedByItsSlowestKeys(t *testing.T) {
	keys := func(slow float64) *typed {
		m := new(typed)
		for i := range 100 {
			m.samples = append(m.samples, 1)
			if i >= 98 {
				m.samples[i] = slow
			}
		}
		return m
	}
	w := &way{states: terminalStates, keys: map[string]*typed{stateIdle: keys(10), stateStalled: keys(13), stateLoaded: keys(20)}}
	for metric, want := range map[string]bool{"keystroke, " + stateStalled: false, "keystroke, " + stateLoaded: true} {
		for _, r := range w.results() {
			if r.Metric == metric && (r.OK == nil || *r.OK != want || r.Ratio != 1) {
				t.Errorf("%+v, want ok to be %v", r, want)
			}
		}
	}
}

func TestASharedConnectionThatBreaksIsReported(t *testing.T) {
	w := &way{name: "shared: ", shared: true, states: terminalStates, keys: map[string]*typed{}}
	for _, state := range terminalStates {
		w.keys[state] = &typed{broken: "connection reset"}
	}
	r := Report{Results: w.results()}
	if err := r.WriteJSON(io.Discard); err != nil {
		t.Errorf("nothing was measured: %v", err)
	}
	if !strings.Contains(r.Results[0].Note, "connection reset") {
		t.Errorf("%+v does not say why", r.Results[0])
	}
}
