package envd_test

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/wrenn/wrenn/api/proto/process"
)

func TestHostileCommandsGetTheirErrorOrRun(t *testing.T) {
	c := startAgent(t).processes()
	dir := t.TempDir()
	loop := filepath.Join(dir, "loop")
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	many := make([]string, 10000) // together 1 MiB
	for i := range many {
		many[i] = strings.Repeat("x", 104)
	}
	count := `c=0; for a; do c=$((c+${#a})); done; echo $c`
	for _, tc := range []struct {
		name string
		req  *process.StartRequest
		text string // of the invalid_argument
		out  string // when it runs
	}{
		{"a cwd that is a cyclic link", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "true", Cwd: &loop}}, "too many levels", ""},
		{"a cwd with NUL", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "true", Cwd: ptr("/a\x00b")}}, "NUL", ""},
		{"a cwd of 1 MiB", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "true", Cwd: ptr("/" + strings.Repeat("x/", 1<<19))}}, "too long", ""},
		{"a variable whose name has =", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "true", Envs: map[string]string{"A=B": "c"}}}, `"A=B"`, ""},
		{"a variable whose name has NUL", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "true", Envs: map[string]string{"A\x00": "c"}}}, "NUL", ""},
		{"a variable without a name", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "true", Envs: map[string]string{"": "c"}}}, "variable name", ""},
		{"a command of 1 MiB", &process.StartRequest{Process: &process.ProcessConfig{Cmd: strings.Repeat("x", 1<<20)}}, "too long", ""},
		{"a command with NUL", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/bin/tr\x00ue"}}, "invalid argument", ""},
		{"an argument of 1 MiB", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "true", Args: []string{strings.Repeat("x", 1<<20)}}}, "argument list too long", ""},
		{"1 MiB of arguments", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "bash", Args: append([]string{"-c", count, "0"}, many...)}}, "", "1040000\n"},
		{"an argument that is a word to others", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "printf", Args: []string{"%s", "$(id); `id`"}}}, "", "$(id); `id`"},
		{"a tag with NUL", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "echo"}, Tag: ptr("a\x00b")}, "", "\n"},
		{"a terminal without a size", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "stty", Args: []string{"size"}}, Pty: &process.PTY{}}, "", "0 0\r\n"},
		{"a terminal of no size", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "stty", Args: []string{"size"}}, Pty: &process.PTY{Size: &process.PTY_Size{}}}, "", "0 0\r\n"},
		{"a terminal larger than any", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "stty", Args: []string{"size"}}, Pty: &process.PTY{Size: &process.PTY_Size{Cols: 1<<32 - 1, Rows: 1 << 16}}}, "", "65535 65535\r\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.text == "" {
				if r := run(t, c, tc.req); r.stdout.String()+r.pty.String() != tc.out || r.end.GetExitCode() != 0 {
					t.Errorf("got %.100q, %q, %v", r.stdout.String()+r.pty.String(), &r.stderr, r.end)
				}
				return
			}
			s, err := c.Start(t.Context(), tc.req)
			if err == nil {
				defer s.Close()
				s.Receive()
				err = s.Err()
			}
			wantCode(t, err, connect.CodeInvalidArgument, tc.text)
			if len(err.Error()) > 10<<10 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

// What no client sends, as bytes on the wire.
func TestHostileMessagesAreInvalid(t *testing.T) {
	a := startAgent(t)
	notText, err := proto.Marshal(&process.StartRequest{Process: &process.ProcessConfig{Cmd: "true", Cwd: ptr("/xxxx")}})
	if err != nil {
		t.Fatal(err)
	}
	notText = []byte(strings.Replace(string(notText), "xxxx", "\xff\xfe\x80y", 1))
	for _, tc := range []struct {
		name, method, codec string
		message             []byte
		code                string
	}{
		{"a selector of unknown kind", "List", "json", []byte(`{"process":{"name":"x"}}`), "ok"},
		{"a selector of unknown kind to Connect", "Connect", "connect+json", []byte(`{"process":{"name":"x"}}`), "invalid_argument"},
		{"a pid that is negative", "Connect", "connect+json", []byte(`{"process":{"pid":-1}}`), "invalid_argument"},
		{"a pid that is text", "SendSignal", "json", []byte(`{"process":{"pid":"x"}}`), "invalid_argument"},
		{"pid and tag together", "SendSignal", "json", []byte(`{"process":{"pid":1,"tag":"x"},"signal":9}`), "invalid_argument"},
		{"a signal that there is not", "SendSignal", "json", []byte(`{"process":{"pid":1},"signal":-7}`), "invalid_argument"},
		{"a selector without kind", "SendInput", "json", []byte(`{"process":{},"input":{"stdin":"eA=="}}`), "invalid_argument"},
		{"input that is not base64", "SendInput", "json", []byte(`{"process":{"tag":"x"},"input":{"stdin":"?"}}`), "invalid_argument"},
		{"a tag with NUL", "CloseStdin", "json", []byte(`{"process":{"tag":"a\u0000b"}}`), "not_found"},
		{"an offset that is no number", "Connect", "connect+json", []byte(`{"process":{"tag":"x"},"offset":"all"}`), "invalid_argument"},
		{"a size that is negative", "Update", "json", []byte(`{"process":{"tag":"x"},"pty":{"size":{"cols":-1}}}`), "invalid_argument"},
		{"no JSON", "Start", "connect+json", []byte(`{"process":`), "invalid_argument"},
		{"a cwd that is not text", "Start", "connect+proto", notText, "invalid_argument"},
		{"no message", "Start", "connect+proto", []byte{0xff, 0xff, 0xff}, "invalid_argument"},
		{"input before the process is named", "StreamInput", "connect+json", []byte(`{"data":{"input":{"stdin":"eA=="}}}`), "invalid_argument"},
		{"an event of no kind", "StreamInput", "connect+json", []byte(`{}`), "invalid_argument"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			body := tc.message
			streams := strings.HasPrefix(tc.codec, "connect+")
			if streams {
				body = append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
			}
			_, _, answer := a.call(t, "POST", "/process.Process/"+tc.method, body, "Content-Type", "application/"+tc.codec)
			if streams {
				if len(answer) < 5 || answer[0] != 2 {
					t.Fatalf("got %q, want the last frame alone", answer)
				}
				var end struct{ Error json.RawMessage }
				if err := json.Unmarshal(answer[5:], &end); err != nil {
					t.Fatal(err)
				}
				answer = end.Error
			}
			var failure struct{ Code, Message string }
			if err := json.Unmarshal(answer, &failure); err != nil {
				t.Fatalf("got %q: %v", answer, err)
			}
			if tc.code == "ok" {
				tc.code = ""
			} else if failure.Message == "" {
				t.Error("the error says nothing")
			}
			if failure.Code != tc.code {
				t.Errorf("got %s, want code %q", answer, tc.code)
			}
		})
	}
}

// Tags and offsets mean the same in both encodings.
func TestAnOffsetInJSONIsTextOrNumber(t *testing.T) {
	for _, text := range []string{`{"process":{"tag":"x"},"offset":"12"}`, `{"process":{"tag":"x"},"offset":12}`} {
		req := &process.ConnectRequest{}
		if err := protojson.Unmarshal([]byte(text), req); err != nil || req.GetOffset() != 12 {
			t.Errorf("%s gives %v, %v", text, req, err)
		}
	}
}

func TestAMessageWithoutMeasureIsRefused(t *testing.T) {
	a := startRealAgent(t)
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	zeros := make([]byte, 1<<20)
	for range 400 {
		w.Write(zeros)
	}
	w.Close()
	for encoding, body := range map[string]io.Reader{
		"gzip":     &packed,
		"identity": io.LimitReader(endless{}, 400<<20),
	} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, a.url+"/process.Process/SendInput", body)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/proto")
		r.Header.Set("Content-Encoding", encoding)
		resp, err := a.http.Do(r)
		if err != nil { // the answer came before the end of the message, and was lost
			continue
		}
		text, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusTooManyRequests || !strings.Contains(string(text), "resource_exhausted") {
			t.Errorf("%s: got %s: %.200s", encoding, resp.Status, text)
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.pid))
	if err != nil {
		t.Fatal(err)
	}
	_, peak, _ := strings.Cut(string(status), "VmHWM:")
	var kib int
	if _, err := fmt.Sscan(peak, &kib); err != nil || kib > 256<<10 {
		t.Errorf("the agent took %d KiB (%v)", kib, err)
	}
}

// endless reads as zeros without end.
type endless struct{}

func (endless) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
