package accesslog

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

// line is a line as a reader has it.
type line struct {
	Time     time.Time `json:"time"`
	Sandbox  string    `json:"sandbox"`
	Port     int       `json:"port"`
	Method   string    `json:"method"`
	Path     string    `json:"path"`
	Protocol string    `json:"protocol"`
	Status   int       `json:"status"`
	Sent     int64     `json:"sent"`
	Received int64     `json:"received"`
	Duration float64   `json:"duration_ms"`
	Answer   *float64  `json:"answer_ms"`
	Client   string    `json:"client"`
	Broken   bool      `json:"broken"`
}

func read(t testing.TB, text []byte) line {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	var l line
	if err := d.Decode(&l); err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return l
}

func TestLineSaysWhatTheRequestWas(t *testing.T) {
	e := Entry{
		Time: time.Date(2026, 3, 4, 5, 6, 7, 89_999_999, time.FixedZone("", 3600)), Sandbox: "abc", Port: 8080,
		Method: "GET", Path: "/a%20b", Protocol: "HTTP/2.0", Status: 206, Sent: 1 << 40, Received: 7,
		Duration: 1500*time.Millisecond + 7*time.Microsecond, Answer: 60 * time.Microsecond, Client: "::1", Broken: true,
	}
	const want = `{"time":"2026-03-04T04:06:07.089Z","sandbox":"abc","port":8080,"method":"GET","path":"/a%20b","protocol":"HTTP/2.0",` +
		`"status":206,"sent":1099511627776,"received":7,"duration_ms":1500.007,"answer_ms":0.060,"client":"::1","broken":true}` + "\n"
	if got := string(e.appendTo(nil)); got != want {
		t.Errorf("line is\n%s want\n%s", got, want)
	}
	e.Status, e.Broken = 0, false
	if got := string(e.appendTo(nil)); strings.Contains(got, "answer_ms") || strings.Contains(got, "broken") {
		t.Errorf("without an answer the line is %s", got)
	}
}

func TestLongPathIsCutBetweenCharacters(t *testing.T) {
	e := Entry{Path: "/" + strings.Repeat("é", maxPath), Method: strings.Repeat("M", 1000)}
	got := read(t, e.appendTo(nil))
	if want := "/" + strings.Repeat("é", (maxPath-1)/2) + "…"; got.Path != want {
		t.Errorf("path has %d bytes: %q", len(got.Path), got.Path)
	}
	if want := strings.Repeat("M", maxWord) + "…"; got.Method != want {
		t.Errorf("method is %q", got.Method)
	}
}

func FuzzEntry(f *testing.F) {
	f.Add("/", "GET", "id", "127.0.0.1", 200, int64(5), int64(1e9))
	f.Add("/\"\\\n\r\x00\x1b[31m\u2028\xff\xc3", "\"}", "a\u0085b", "fe80::1%eth0", -1, int64(-1), int64(-1))
	f.Fuzz(func(t *testing.T, path, method, id, client string, status int, sent, took int64) {
		e := Entry{
			Time: time.Unix(1e9, 0), Path: path, Method: method, Sandbox: id, Client: client,
			Status: status, Sent: sent, Duration: time.Duration(took), Answer: time.Duration(took),
		}
		b := e.appendTo(nil)
		if !json.Valid(b) || bytes.IndexByte(b, '\n') != len(b)-1 {
			t.Fatalf("not one line of JSON: %q", b)
		}
		for _, r := range string(b[:len(b)-1]) {
			if unicode.IsControl(r) || r == '\u2028' || r == '\u2029' {
				t.Fatalf("%U in %q", r, b)
			}
		}
		if len(b) > 8<<10 {
			t.Fatalf("%d bytes", len(b))
		}
		got := read(t, b)
		if utf8.ValidString(path) && len(path) <= maxPath && got.Path != path {
			t.Fatalf("path %q reads %q", path, got.Path)
		}
		if got.Status != status || got.Sent != sent {
			t.Fatalf("%q reads %+v", b, got)
		}
	})
}

func BenchmarkWrite(b *testing.B) {
	l := start(discard{}, nil)
	defer l.Close(b.Context())
	e := Entry{
		Time: time.Now(), Sandbox: strings.Repeat("a", 20), Port: 8080, Method: "GET", Path: "/api/kernels/0f1e2d3c/channels",
		Protocol: "HTTP/1.1", Status: 200, Sent: 1024, Duration: time.Millisecond, Answer: time.Millisecond, Client: "127.0.0.1",
	}
	b.ReportAllocs()
	for b.Loop() {
		l.Write(&e)
	}
}

type discard struct{}

func (discard) write([]byte) (int, error) { return 0, nil }
func (discard) Close() error              { return nil }
