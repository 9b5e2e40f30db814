package envd_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/process"
	"github.com/wrenn/wrenn/api/proto/process/processconnect"
)

// attached is a stream of a running process and what came over it so far.
type attached struct {
	*connect.ServerStreamForClient[process.ConnectResponse]
	result
	start *process.ProcessEvent_StartEvent
}

// attach connects to a process and takes the start event.
func attach(ctx context.Context, c processconnect.ProcessClient, req *process.ConnectRequest) (*attached, error) {
	s, err := c.Connect(ctx, req)
	if err != nil {
		return nil, err
	}
	a := &attached{ServerStreamForClient: s}
	if !s.Receive() {
		s.Close()
		return nil, s.Err()
	}
	a.start = s.Msg().GetEvent().GetStart()
	if a.start == nil {
		s.Close()
		return nil, fmt.Errorf("first event is %v, want start", s.Msg())
	}
	return a, nil
}

func mustAttach(t *testing.T, c processconnect.ProcessClient, req *process.ConnectRequest) *attached {
	t.Helper()
	a, err := attach(t.Context(), c, req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

// toEnd reads on to the end event.
func (a *attached) toEnd(t *testing.T) *attached {
	t.Helper()
	drain(t, a, func() *process.ProcessEvent { return a.Msg().GetEvent() }, &a.result)
	return a
}

// until reads on until ok holds.
func (a *attached) until(t *testing.T, ok func() bool) {
	t.Helper()
	for !ok() {
		if !a.Receive() {
			t.Fatalf("stream ended: %v", a.Err())
		}
		a.add(a.Msg().GetEvent())
	}
}

func kill(t *testing.T, c processconnect.ProcessClient, id uint32) {
	t.Helper()
	_, err := c.SendSignal(context.WithoutCancel(t.Context()), &process.SendSignalRequest{Process: pid(id), Signal: process.Signal_SIGNAL_SIGKILL})
	if err != nil && connect.CodeOf(err) != connect.CodeNotFound {
		t.Error(err)
	}
}

// numbers is what seq 1 n writes.
func numbers(n int) []byte {
	var b bytes.Buffer
	for i := 1; i <= n; i++ {
		b.WriteString(strconv.Itoa(i))
		b.WriteByte('\n')
	}
	return b.Bytes()
}

func TestConnectBeginsAtTheOffsetAskedFor(t *testing.T) {
	a := startAgent(t)
	c := a.processes()
	s, id := start(t.Context(), t, c, bash("printf 0123456789; sleep 100"))
	defer kill(t, c, id)
	if got := s.ResponseHeader().Get("Wrenn-Output-Offset"); got != "0" {
		t.Errorf("start begins at %q, want 0", got)
	}
	if !s.Receive() || string(s.Msg().GetEvent().GetData().GetStdout()) != "0123456789" {
		t.Fatalf("got %v, %v", s.Msg(), s.Err())
	}
	for _, tc := range []struct {
		name           string
		offset         *int64
		header         string
		want           string // the output
		begins         string // the response header
		inStart        bool   // the start event says where it begins
		code           connect.Code
		text, takeover string
	}{
		{name: "all of it", offset: ptr[int64](0), want: "0123456789", begins: "0", inStart: true},
		{name: "the middle of a chunk", offset: ptr[int64](7), want: "789", begins: "7", inStart: true},
		{name: "the end", offset: ptr[int64](10), begins: "10", inStart: true},
		{name: "no offset is from now on, told in the header only", begins: "10"},
		{name: "a header says the same", header: "4", want: "456789", begins: "4", inStart: true},
		{name: "the field counts before the header", offset: ptr[int64](8), header: "4", want: "89", begins: "8", inStart: true},
		{name: "negative", offset: ptr[int64](-1), code: connect.CodeInvalidArgument, text: "-1"},
		{name: "negative in the header", header: "-3", code: connect.CodeInvalidArgument, text: "-3"},
		{name: "not a number", header: "1e3", code: connect.CodeInvalidArgument, text: "1e3"},
		{name: "too large for a number", header: strings.Repeat("9", 4000), code: connect.CodeInvalidArgument, text: "Wrenn-Output-Offset"},
		{name: "beyond what was written", offset: ptr[int64](11), code: connect.CodeOutOfRange, text: "10 bytes so far"},
		{name: "takeover that is no word", takeover: "maybe", code: connect.CodeInvalidArgument, text: "maybe"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx, info := connect.NewClientContext(t.Context())
			if tc.header != "" {
				info.RequestHeader().Set("Wrenn-Output-Offset", tc.header)
			}
			if tc.takeover != "" {
				info.RequestHeader().Set("Wrenn-Takeover", tc.takeover)
			}
			at, err := attach(ctx, c, &process.ConnectRequest{Process: pid(id), Offset: tc.offset})
			if tc.code != 0 {
				wantCode(t, err, tc.code, tc.text)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer at.Close()
			at.until(t, func() bool { return at.stdout.Len() >= len(tc.want) })
			if at.stdout.String() != tc.want || at.ResponseHeader().Get("Wrenn-Output-Offset") != tc.begins {
				t.Errorf("got %q from %q on, want %q from %q on", &at.stdout, at.ResponseHeader().Get("Wrenn-Output-Offset"), tc.want, tc.begins)
			}
			if (at.start.Offset != nil) != tc.inStart || at.start.Lost != nil {
				t.Errorf("start event is %v", at.start)
			}
			if tc.inStart && strconv.FormatInt(at.start.GetOffset(), 10) != tc.begins {
				t.Errorf("start event says offset %d", at.start.GetOffset())
			}
		})
	}
}

func TestADetachedProcessKeepsItsLastMebibyteAndSaysWhatIsGone(t *testing.T) {
	a := startAgent(t)
	c := a.processes()
	all := numbers(400000) // 2.6 MB
	for _, tc := range []struct {
		name  string
		lines int
		lost  bool
	}{{"1 MiB is all there", 165600, false}, {"of more the oldest is gone", 400000, true}} {
		t.Run(tc.name, func(t *testing.T) {
			want := numbers(tc.lines)
			if !tc.lost && (len(want) > 1<<20 || len(want) < 1<<20-2000) {
				t.Fatalf("%d bytes are not about 1 MiB", len(want))
			}
			done := filepath.Join(t.TempDir(), "done")
			ctx, leave := context.WithCancel(t.Context())
			req := bash(fmt.Sprintf("read x; seq 1 %d; echo > %s; read x; exit 3", tc.lines, done))
			req.Stdin = nil
			_, id := start(ctx, t, c, req)
			leave()
			line := func() {
				t.Helper()
				if _, err := c.SendInput(t.Context(), &process.SendInputRequest{Process: pid(id), Input: stdinOf("\n")}); err != nil {
					t.Fatal(err)
				}
			}
			line()
			eventually(t, "the detached process has written it all", func() bool { _, err := os.Stat(done); return err == nil })
			line()
			// Also when it has ended meanwhile.
			for range 2 {
				at := mustAttach(t, c, &process.ConnectRequest{Process: pid(id), Offset: ptr[int64](0)}).toEnd(t)
				if (at.start.GetLost() > 0) != tc.lost || at.start.GetLost() != at.start.GetOffset() {
					t.Errorf("got start %v", at.start)
				}
				if at.stdout.Len() < min(1<<20, len(want)) {
					t.Errorf("only %d bytes are kept", at.stdout.Len())
				}
				if !bytes.Equal(at.stdout.Bytes(), all[at.start.GetOffset():len(want)]) || at.end.GetExitCode() != 3 {
					t.Errorf("got %d bytes that are not those from %d on, and %v", at.stdout.Len(), at.start.GetOffset(), at.end)
				}
			}
		})
	}
}

// A client that comes and goes gets, put together, exactly what was written, as
// long as it is never away for more than what is kept.
func TestReconnectingAtTheLastByteGivesTheWholeOutput(t *testing.T) {
	a := startAgent(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for _, tc := range []struct {
		name string
		req  *process.StartRequest
	}{
		// The process is slowed so that a connection never holds more unread
		// bytes than are kept: what the client throws away it can ask for again.
		{"pipes", bash("for i in {1..3000}; do echo out $i; echo err $i >&2; ((i % 500)) || sleep 0.02; done; exit 4")},
		{"a terminal", onTerminal("for i in {1..3000}; do echo out $i; echo err $i; ((i % 500)) || sleep 0.02; done; exit 4")},
	} {
		for _, codec := range []struct {
			name string
			opts []connect.ClientOption
		}{{"binary", nil}, {"json", []connect.ClientOption{connect.WithProtoJSON()}}} {
			t.Run(tc.name+"/"+codec.name, func(t *testing.T) {
				random := rand.New(rand.NewPCG(seed, 1))
				c := a.processes(codec.opts...)
				ctx, leave := context.WithCancel(t.Context())
				_, id := start(ctx, t, c, tc.req)
				leave()
				got := &result{}
				offset, visits := int64(0), 0
				for got.end == nil {
					visits++
					ctx, leave := context.WithCancel(t.Context())
					at, err := attach(ctx, c, &process.ConnectRequest{Process: pid(id), Offset: &offset})
					if err != nil {
						t.Fatal(err)
					}
					if at.start.GetOffset() != offset || at.start.Lost != nil {
						t.Fatalf("asked for %d, got %v", offset, at.start)
					}
					for n := random.IntN(6); n >= 0 && at.Receive(); n-- {
						e := at.Msg().GetEvent()
						got.add(e)
						d := e.GetData()
						offset += int64(len(d.GetStdout()) + len(d.GetStderr()) + len(d.GetPty()))
					}
					leave() // in the middle of it
					at.Close()
				}
				var out, err, pty strings.Builder
				for i := 1; i <= 3000; i++ {
					fmt.Fprintf(&out, "out %d\n", i)
					fmt.Fprintf(&err, "err %d\n", i)
					fmt.Fprintf(&pty, "out %d\r\nerr %d\r\n", i, i)
				}
				if tc.req.GetPty() != nil {
					out.Reset()
					err.Reset()
				} else {
					pty.Reset()
				}
				if got.stdout.String() != out.String() || got.stderr.String() != err.String() || got.pty.String() != pty.String() {
					t.Errorf("after %d visits got %d, %d and %d bytes, want %d, %d and %d", visits,
						got.stdout.Len(), got.stderr.Len(), got.pty.Len(), out.Len(), err.Len(), pty.Len())
				}
				if visits < 3 || got.end.GetExitCode() != 4 {
					t.Errorf("%d visits, end %v", visits, got.end)
				}
			})
		}
	}
}

func TestATakeoverEndsOtherStreamsAndMissesNothing(t *testing.T) {
	a := startAgent(t)
	c := a.processes()
	s, id := start(t.Context(), t, c, onTerminal("stty -echo; for i in {1..20}; do read x; echo got $x; done"))
	second := mustAttach(t, c, &process.ConnectRequest{Process: pid(id), Offset: ptr[int64](0)})
	typed := make(chan error, 1)
	go func() {
		for i := range 20 {
			if _, err := c.SendInput(t.Context(), &process.SendInputRequest{Process: pid(id), Input: ptyOf(fmt.Sprintf("%d\n", i))}); err != nil {
				typed <- err
				return
			}
			time.Sleep(5 * time.Millisecond) // so that the takeover comes in between
		}
		typed <- nil
	}()
	second.until(t, func() bool { return strings.Contains(second.pty.String(), "got 5") })
	ctx, info := connect.NewClientContext(t.Context())
	info.RequestHeader().Set("Wrenn-Takeover", "true")
	third, err := attach(ctx, c, &process.ConnectRequest{Process: pid(id), Offset: ptr(int64(second.pty.Len()))})
	if err != nil {
		t.Fatal(err)
	}
	defer third.Close()
	for s.Receive() {
		if s.Msg().GetEvent().GetEnd() != nil {
			t.Fatal("a client that was taken over from saw the end")
		}
	}
	wantCode(t, s.Err(), connect.CodeAborted, "taken the process over")
	kept := second.pty.String()
	for second.Receive() {
	}
	wantCode(t, second.Err(), connect.CodeAborted, "taken the process over")
	third.toEnd(t)
	if err := <-typed; err != nil {
		t.Fatal(err)
	}
	all := kept + third.pty.String()
	for i, at := 0, 0; i < 20; i++ {
		next := strings.Index(all[at:], fmt.Sprintf("got %d\r\n", i))
		if next < 0 {
			t.Fatalf("answer %d is missing in %q", i, all)
		}
		at += next
	}
}

func TestOutputOfALoadedMachineIsWhole(t *testing.T) {
	busy(t, 8)
	a := startAgent(t)
	c := a.processes()
	for _, tc := range []struct {
		name string
		req  *process.StartRequest
		n    int
		want func(*result) bool
	}{
		{"a pipeline", bash("yes | head -c 5000000; exit 3"), 4, func(r *result) bool {
			return bytes.Equal(r.stdout.Bytes(), bytes.Repeat([]byte("y\n"), 2500000)) && r.end.GetExitCode() == 3
		}},
		{"a tee that outlives the shell", bash("exec > >(tee /dev/null); seq 1 20000"), 15, func(r *result) bool {
			return bytes.Equal(r.stdout.Bytes(), numbers(20000))
		}},
		{"a terminal's last words", onTerminal("seq -s ' ' 1 600; exit 3"), 60, func(r *result) bool {
			return strings.HasSuffix(r.pty.String(), " 599 600\r\n") && r.end.GetExitCode() == 3
		}},
		{"a terminal with much to say", onTerminal("seq 1 20000"), 10, func(r *result) bool {
			return r.pty.String() == strings.ReplaceAll(string(numbers(20000)), "\n", "\r\n")
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			failures := 0
			for range tc.n {
				s, _ := start(t.Context(), t, c, tc.req)
				r := &result{}
				for i := 0; s.Receive(); i++ {
					r.add(s.Msg().GetEvent())
					if i%40 == 0 {
						time.Sleep(2 * time.Millisecond) // a slow reader
					}
				}
				if s.Err() != nil || r.end == nil {
					t.Fatalf("%v, %v", r.end, s.Err())
				}
				if !tc.want(r) {
					failures++
					t.Logf("got %d bytes of stdout and %d of terminal (%.60q), %v", r.stdout.Len(), r.pty.Len(), r.pty.String()[max(0, r.pty.Len()-60):], r.end)
				}
			}
			if failures > 0 {
				t.Errorf("output was cut %d times in %d", failures, tc.n)
			}
		})
	}
}

// busy keeps processors busy until the test ends.
func busy(t *testing.T, loops int) {
	t.Helper()
	a := startAgent(t)
	for range loops {
		_, id := start(t.Context(), t, a.processes(), bash("while :; do :; done"))
		t.Cleanup(func() { kill(t, a.processes(), id) })
	}
}

// Children that stay and never stop working, or talking, hold the end up for a
// second at most, and cost none of the process's own output.
func TestTheEndDoesNotWaitForChildrenForever(t *testing.T) {
	c := startAgent(t).processes()
	for _, tc := range []struct{ name, child string }{
		{"one that writes now and then", "while echo more; do sleep 0.02; done"},
		{"one that writes all the time", "while echo more; do :; done"},
		{"one that only computes", "while :; do :; done"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			began := time.Now()
			r := run(t, c, bash("("+tc.child+") & echo $!; seq 1 100000; exit 3"))
			defer syscall.Kill(-int(r.pid), syscall.SIGKILL) // the child's group
			if took := time.Since(began); took > 4*time.Second {
				t.Errorf("the end came after %v", took)
			}
			own := strings.ReplaceAll(r.stdout.String(), "more\n", "")
			_, own, _ = strings.Cut(own, "\n")
			if own != string(numbers(100000)) || r.end.GetExitCode() != 3 {
				t.Errorf("got %d bytes of its own and %v", len(own), r.end)
			}
		})
	}
}
