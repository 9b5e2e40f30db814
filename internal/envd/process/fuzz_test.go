package process

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/user"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	rpc "github.com/wrenn/wrenn/api/proto/process"
	"github.com/wrenn/wrenn/api/proto/process/processconnect"
	"github.com/wrenn/wrenn/internal/envd/settings"
)

// methods are what a fuzzed request can be for, and whether its answer is a stream.
var methods = []struct {
	name    string
	streams bool
}{
	{"Start", true}, {"Connect", true}, {"StreamInput", true}, {"List", false}, {"Update", false},
	{"SendInput", false}, {"SendSignal", false}, {"CloseStdin", false},
}

// FuzzProcessHandlers sends anything to any method, as JSON or binary, framed or
// not, with any headers of ours. There is a terminal it may play with. What it
// happens to start runs as nobody, in an empty directory.
func FuzzProcessHandlers(f *testing.F) {
	if _, err := user.Lookup("nobody"); os.Getuid() != 0 || err != nil {
		f.Skip("what is fuzzed may start programs: only root can have them run as nobody")
	}
	ctx, cancel := context.WithCancel(context.Background())
	f.Cleanup(cancel)
	reaper := NewReaper(false)
	go reaper.Run(ctx)
	var s settings.Settings
	s.SetDefaults("nobody", "/")
	s.SetEnv(map[string]string{"PATH": "/nowhere"})
	service := NewService(reaper, &s, slog.New(slog.DiscardHandler))
	_, handler := processconnect.NewProcessHandler(service)

	it := &rpc.StartRequest{Process: &rpc.ProcessConfig{Cmd: "/bin/cat"}, Pty: &rpc.PTY{}, Tag: new(string)}
	*it.Tag = "it"

	for method := range methods {
		for _, body := range []string{
			`{"process":{"cmd":"/bin/true","args":["a"],"envs":{"A":"b"},"cwd":"/"},"pty":{"size":{"cols":80,"rows":24}},"tag":"t","stdin":false}`,
			`{"process":{"tag":"it"},"offset":"3","takeover":true}`,
			`{"process":{"pid":7},"input":{"pty":"eA=="},"signal":"SIGNAL_SIGTERM"}`,
			`{"start":{"process":{"tag":"it"}}}`,
			"\n\x04\x12\x02it\x10\x03\x18\x01",
		} {
			f.Add(uint8(method), body[0] == '{', true, []byte(body), "3", "true", "50")
			f.Add(uint8(method), body[0] != '{', false, []byte(body), "-1", "no", "x")
		}
	}
	f.Fuzz(func(t *testing.T, method uint8, asJSON, framed bool, body []byte, offset, takeover, timeout string) {
		if service.table.find(&rpc.ProcessSelector{Selector: &rpc.ProcessSelector_Tag{Tag: "it"}}, false) == nil {
			_, reader, err := service.start(t.Context(), it)
			if err != nil {
				t.Fatal(err)
			}
			reader.detach()
		}
		m := methods[int(method)%len(methods)]
		contentType := "application/"
		if m.streams {
			contentType += "connect+"
		}
		if asJSON {
			contentType += "json"
		} else {
			contentType += "proto"
		}
		if m.streams && framed {
			body = append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/process.Process/"+m.name, bytes.NewReader(body))
		r.Header.Set("Content-Type", contentType)
		r.Header.Set("Wrenn-Output-Offset", offset)
		r.Header.Set("Wrenn-Takeover", takeover)
		r.Header.Set("Connect-Timeout-Ms", timeout)
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		for _, e := range service.table.running() {
			if e.config != it.GetProcess() {
				_ = e.Signal(syscall.SIGKILL)
			}
		}
		checkAnswer(t, m.streams, w.Result().StatusCode, w.Body.Bytes())
	})
}

// checkAnswer holds an answer to the protocol: a stream is whole frames of which
// the last one alone is the end; an error has a code that exists and says what
// was wrong.
func checkAnswer(t *testing.T, streams bool, status int, body []byte) {
	t.Helper()
	if status == http.StatusUnsupportedMediaType {
		return
	}
	var failure struct{ Code, Message string }
	if !streams {
		if status == http.StatusOK {
			return
		}
		if err := json.Unmarshal(body, &failure); err != nil {
			t.Fatalf("status %d with body %.200q: %v", status, body, err)
		}
	} else {
		last := false
		for len(body) > 0 {
			if last || len(body) < 5 || len(body)-5 < int(binary.BigEndian.Uint32(body[1:])) {
				t.Fatalf("status %d, no whole frame: %.200q", status, body)
			}
			frame := body[5:][:binary.BigEndian.Uint32(body[1:])]
			if last = body[0]&2 != 0; last {
				var end struct {
					Error *struct{ Code, Message string }
				}
				if err := json.Unmarshal(frame, &end); err != nil {
					t.Fatalf("last frame %.200q: %v", frame, err)
				}
				if end.Error == nil {
					return
				}
				failure = *end.Error
			}
			body = body[5+len(frame):]
		}
		if !last {
			t.Fatalf("status %d, and no last frame", status)
		}
	}
	var code connect.Code
	if err := code.UnmarshalText([]byte(failure.Code)); err != nil || failure.Message == "" {
		t.Errorf("got code %q, message %.200q", failure.Code, failure.Message)
	}
	if code == connect.CodeUnknown || code == connect.CodeDataLoss {
		t.Errorf("got code %v, message %.200q, which says nothing", code, failure.Message)
	}
}
