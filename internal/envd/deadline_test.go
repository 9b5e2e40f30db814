package envd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/wrenn/wrenn/api/proto/process"
)

func TestTheDeadlineKillsTheProcessAlsoAfterTheClientLeft(t *testing.T) {
	a := startAgent(t)
	ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
	defer cancel()
	s, id := start(ctx, t, a.processes(), bash("sleep 100 & wait"))
	for s.Receive() {
		if s.Msg().GetEvent().GetEnd() != nil {
			t.Error("the client saw the kill instead of the deadline")
		}
	}
	wantCode(t, s.Err(), connect.CodeDeadlineExceeded, "")

	ctx2, cancel2 := context.WithTimeout(t.Context(), 400*time.Millisecond)
	_, id2 := start(ctx2, t, a.processes(), bash("sleep 100 & wait"))
	cancel2()
	for _, id := range []uint32{id, id2} {
		eventually(t, "the process group is gone", func() bool { return syscall.Kill(-int(id), 0) == syscall.ESRCH })
	}
}

func TestConnectsOwnDeadlineEndsOnlyItsStream(t *testing.T) {
	c := startAgent(t).processes()
	s, id := start(t.Context(), t, c, bash("sleep 0.6; echo still here"))
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	at, err := attach(ctx, c, &process.ConnectRequest{Process: pid(id)})
	if err != nil {
		t.Fatal(err)
	}
	defer at.Close()
	for at.Receive() {
	}
	wantCode(t, at.Err(), connect.CodeDeadlineExceeded, "")
	r := &result{}
	drain(t, s, func() *process.ProcessEvent { return s.Msg().GetEvent() }, r)
	if r.stdout.String() != "still here\n" || r.end.GetExitCode() != 0 {
		t.Errorf("got %q and %v", &r.stdout, r.end)
	}
}

// With its deadline a client that reads nothing lets the others go on.
func TestADeadlineAlsoEndsAStreamThatNobodyReads(t *testing.T) {
	a := startAgent(t)
	c := a.processes()
	s, id := start(t.Context(), t, c, bash("seq 1 3000000")) // 23 MB
	stuck := rawCall(t, a, "Connect", &process.ConnectRequest{Process: pid(id), Offset: ptr(int64(0))}, "Connect-Timeout-Ms: 300")
	defer stuck.Close()
	r := &result{}
	drain(t, s, func() *process.ProcessEvent { return s.Msg().GetEvent() }, r)
	if !bytes.Equal(r.stdout.Bytes(), numbers(3000000)) {
		t.Errorf("got %d bytes", r.stdout.Len())
	}
}

// Whoever wants to send the rest must be told where it begins.
func TestInputCutByItsDeadlineSaysHowMuchWasWritten(t *testing.T) {
	a := startAgent(t)
	c := a.processes()
	s, id := start(t.Context(), t, c, &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-c", "while [ ! -e $0 ]; do sleep 0.01; done; wc -c", t.TempDir() + "/go"}}})
	message, err := protojson.Marshal(&process.SendInputRequest{Process: pid(id), Input: stdinOf(strings.Repeat("x", 1<<20))})
	if err != nil {
		t.Fatal(err)
	}
	status, header, body := a.call(t, "POST", "/process.Process/SendInput", message, "Content-Type", "application/json", "Connect-Timeout-Ms", "2000")
	written, err := strconv.Atoi(header.Get("Wrenn-Input-Written"))
	if status != http.StatusGatewayTimeout || err != nil || written < 1 || written >= 1<<20 {
		t.Fatalf("got %d, %v, %s", status, header, body)
	}
	if text := fmt.Sprintf("wrote %d of %d bytes", written, 1<<20); !strings.Contains(string(body), text) || !strings.Contains(string(body), "deadline_exceeded") {
		t.Errorf("got %s, want %q in it", body, text)
	}
	kill(t, c, id)
	for s.Receive() {
	}
}

func TestAStreamOfInputThatEndsBadlySaysHowMuchWasWritten(t *testing.T) {
	c := startAgent(t).processes()
	_, id := start(t.Context(), t, c, &process.StartRequest{Process: &process.ProcessConfig{Cmd: "sleep", Args: []string{"100"}}})
	defer kill(t, c, id)
	in, err := c.StreamInput(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, event := range []*process.StreamInputRequest{
		{Event: &process.StreamInputRequest_Start{Start: &process.StreamInputRequest_StartEvent{Process: pid(id)}}},
		{Event: &process.StreamInputRequest_Data{Data: &process.StreamInputRequest_DataEvent{Input: stdinOf("12345")}}},
		{}, // of no type
	} {
		if err := in.Send(event); err != nil {
			t.Fatal(err)
		}
	}
	_, err = in.CloseAndReceive()
	wantCode(t, err, connect.CodeInvalidArgument, "unknown type")
	if failure := (*connect.Error)(nil); !errors.As(err, &failure) || failure.Meta().Get("Wrenn-Input-Written") != "5" {
		t.Errorf("got metadata %v", failure.Meta())
	}
}
