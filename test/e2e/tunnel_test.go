package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// digestServer answers, once its client has ended its direction, with the SHA-256 of
// what came, and greets it before.
const digestServer = `exec python3 -c '
import hashlib, socketserver
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"hello\n")
        digest = hashlib.sha256()
        while piece := self.connection.recv(1 << 16):
            digest.update(piece)
        self.wfile.write(digest.hexdigest().encode() + b"\n")
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("127.0.0.1", 9000), Handler).serve_forever()'`

// Raw TCP to a server in a sandbox that listens on the loopback only, by every way
// that there is.
func TestPortsAreReachedAsRawTCP(t *testing.T) {
	p := startPlatform(t)
	b := p.create(nil)
	b.background(digestServer, false)
	b.background("echo a page > /tmp/page; exec python3 -m http.server 9001 --bind 127.0.0.1 -d /tmp", false)
	for _, port := range []int{9000, 9001} {
		eventually(t, 30*time.Second, "the servers are up", func() error {
			if r := b.try(fmt.Sprintf("exec 3<>/dev/tcp/127.0.0.1/%d", port)); r.err != nil || r.exit != 0 {
				return fmt.Errorf("%s", r)
			}
			return nil
		})
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<19) // 8 MiB
	want := fmt.Sprintf("hello\n%x\n", sha256.Sum256(data))

	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	forward := p.command("sandbox", "forward", b.id, "0:9000", "0:9001")
	var complaints bytes.Buffer
	forward.Stderr = &complaints
	addrs := startForward(t, ctx, forward, 2)

	t.Run("forwarded, with the end of one direction", func(t *testing.T) {
		conn, err := net.Dial("tcp", addrs[0])
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(time.Minute))
		go func() {
			conn.Write(data)
			conn.(*net.TCPConn).CloseWrite()
		}()
		if answer, err := io.ReadAll(conn); err != nil || string(answer) != want {
			t.Errorf("answer = %q, %v; want %q", answer, err, want)
		}
	})
	t.Run("forwarded, curl", func(t *testing.T) {
		if out := curl(t, ctx, "http://"+addrs[1]+"/page"); out != "a page\n" {
			t.Errorf("curl got %q", out)
		}
	})
	t.Run("standard streams", func(t *testing.T) {
		if r := p.tryWrenn(string(data), "sandbox", "forward", "--stdio", b.id, "9000"); r.stdout != want || r.exit != 0 {
			t.Errorf("%s", r)
		}
	})
	domain := fmt.Sprintf("9001-%s.wrenn.localhost", b.id)
	t.Run("curl through CONNECT", func(t *testing.T) {
		if out := curl(t, ctx, "--proxytunnel", "--proxy", p.url, "http://"+domain+"/page"); out != "a page\n" {
			t.Errorf("curl got %q", out)
		}
	})
	t.Run("curl through CONNECT with routing headers", func(t *testing.T) {
		out := curl(t, ctx, "--proxytunnel", "--proxy", p.url, "--proxy-header", "E2b-Sandbox-Id: "+b.id,
			"--proxy-header", "E2b-Sandbox-Port: 9001", "http://any.internal/page")
		if out != "a page\n" {
			t.Errorf("curl got %q", out)
		}
	})
	t.Run("Python through CONNECT", func(t *testing.T) {
		script := `import http.client, sys
c = http.client.HTTPConnection(sys.argv[1])
c.set_tunnel(sys.argv[2], 80)
c.request("GET", "/page")
print(c.getresponse().read().decode(), end="")`
		out, err := exec.CommandContext(ctx, "python3", "-c", script, p.listen, domain).CombinedOutput()
		if err != nil || string(out) != "a page\n" {
			t.Errorf("%s, %v", out, err)
		}
	})
	t.Run("the guest agent is not reached", func(t *testing.T) {
		out, err := exec.CommandContext(ctx, "curl", "-sv", "--proxytunnel", "--proxy", p.url,
			fmt.Sprintf("http://49983-%s.wrenn.localhost/health", b.id)).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "403 Forbidden") {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("the end of the sandbox", func(t *testing.T) {
		conn, err := net.Dial("tcp", addrs[0])
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(time.Minute))
		if _, err := io.ReadFull(conn, make([]byte, len("hello\n"))); err != nil {
			t.Fatal(err)
		}
		b.kill()
		if rest, err := io.ReadAll(conn); err == nil {
			t.Errorf("the connection ended properly, with %q", rest)
		}
		if err := forward.Wait(); err == nil || !strings.Contains(complaints.String(), "forwarding has ended: no sandbox "+b.id) {
			t.Errorf("%v; %s", err, complaints.String())
		}
	})
}

// startForward starts `wrenn sandbox forward` and returns what it listens on, one
// address for each pair.
func startForward(t *testing.T, ctx context.Context, cmd *exec.Cmd, pairs int) (addrs []string) {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	t.Cleanup(func() {
		stop()
		cmd.Process.Kill()
	})
	lines := bufio.NewScanner(out)
	for len(addrs) < pairs && lines.Scan() {
		if addr, ok := strings.CutPrefix(lines.Text(), "forwarding 127.0.0.1:"); ok {
			port, _, _ := strings.Cut(addr, " ")
			addrs = append(addrs, "127.0.0.1:"+port)
		}
	}
	if len(addrs) < pairs {
		t.Fatalf("%v said where it listens of %d pairs only", cmd.Args, len(addrs))
	}
	return addrs
}

func curl(t *testing.T, ctx context.Context, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(ctx, "curl", append([]string{"-sS", "--noproxy", ""}, args...)...)
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("curl %v: %v; %s", args, err, complaints.String())
	}
	return string(out)
}
