package envd_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/wrenn/wrenn/api/proto/process"
)

// A client that reads nothing holds the process up; another one sets it free.
func TestATakeoverFreesAProcessFromAClientThatDoesNotRead(t *testing.T) {
	a := startAgent(t)
	c := a.processes()
	done := filepath.Join(t.TempDir(), "done")
	_, id := start(t.Context(), t, c, bash("seq 1 8000000; echo > "+done)) // 63 MB, and is not read
	finished := func() bool { _, err := os.Stat(done); return err == nil }
	var offset int64
	for stable := 0; stable < 5; { // until the process stands still
		time.Sleep(50 * time.Millisecond)
		at := mustAttach(t, c, &process.ConnectRequest{Process: pid(id), Offset: nil})
		n, err := strconv.ParseInt(at.ResponseHeader().Get("Wrenn-Output-Offset"), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		at.Close()
		if n == offset {
			stable++
		} else {
			offset, stable = n, 0
		}
	}
	if finished() {
		t.Fatal("the process was not held up, so the test shows nothing")
	}
	from := offset - 1<<19
	at := mustAttach(t, c, &process.ConnectRequest{Process: pid(id), Takeover: true, Offset: &from}).toEnd(t)
	if at.start.Lost != nil || !bytes.Equal(at.stdout.Bytes(), numbers(8000000)[from:]) {
		t.Errorf("got %d bytes from %v on", at.stdout.Len(), at.start)
	}
}

// One of two clients leaves abruptly while the process waits for it.
func TestAClientThatVanishesHoldsNothingUp(t *testing.T) {
	a := startAgent(t)
	done := filepath.Join(t.TempDir(), "done")
	conn := rawStart(t, a, fmt.Sprintf("seq 1 3000000; echo > %s", done)) // 23 MB
	time.Sleep(200 * time.Millisecond)                                    // the process fills all buffers
	if _, err := os.Stat(done); err == nil {
		t.Fatal("the process was not held up, so the test shows nothing")
	}
	conn.SetLinger(0) // RST
	conn.Close()
	eventually(t, "the process goes on", func() bool { _, err := os.Stat(done); return err == nil })
}

func TestMemoryStaysBoundedWhileAReaderSleeps(t *testing.T) {
	a := startAgent(t)
	const size = 100 << 20
	s, _ := start(t.Context(), t, a.processes(), bash(fmt.Sprintf("yes | head -c %d", size)))
	runtime.GC()
	var before, now runtime.MemStats
	runtime.ReadMemStats(&before)
	var most uint64
	line, n := []byte("y\n"), 0
	for i := 0; s.Receive(); i++ {
		for _, b := range s.Msg().GetEvent().GetData().GetStdout() {
			if b != line[n%2] {
				t.Fatalf("byte %d is %q", n, b)
			}
			n++
		}
		if i%400 == 100 {
			time.Sleep(30 * time.Millisecond)
			runtime.GC()
			runtime.ReadMemStats(&now)
			most = max(most, now.HeapAlloc)
		}
	}
	if s.Err() != nil || n != size {
		t.Fatalf("got %d bytes, %v", n, s.Err())
	}
	if grown := int64(most) - int64(before.HeapAlloc); grown > 12<<20 {
		t.Errorf("the agent and its client took %d KiB more", grown>>10)
	}
}

// rawStart starts a script over a connection of its own that nobody reads.
func rawStart(t *testing.T, a *agent, script string) *net.TCPConn {
	t.Helper()
	return rawCall(t, a, "Start", bash(script))
}

// rawCall makes a streaming call over a connection of its own that nobody reads.
func rawCall(t *testing.T, a *agent, method string, request proto.Message, header ...string) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(a.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	message, err := protojson.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	body := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))
	body = append(body, message...)
	header = append(header, "Host: agent", "Content-Type: application/connect+json", fmt.Sprintf("Content-Length: %d", len(body)))
	_, err = fmt.Fprintf(conn, "POST /process.Process/%s HTTP/1.1\r\n%s\r\n\r\n%s", method, strings.Join(header, "\r\n"), body)
	if err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}
