package envd_test

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/envd"
)

// Linux refuses a second listener in any case; the sandbox kernel does so only
// where the first has not agreed to share the address.
func TestTheAgentsPortIsNotShared(t *testing.T) {
	l, err := envd.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var reuse int
	var option error
	if err := conn.Control(func(fd uintptr) {
		reuse, option = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR)
	}); err != nil || option != nil {
		t.Fatal(err, option)
	}
	if reuse != 0 {
		t.Error("the agent's listener lets others have its port")
	}
}
