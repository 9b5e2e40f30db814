package envd

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// testCheck leaves a peer room for what Linux allows itself: it answers such
// questions no more than twice a second.
const testCheck = 500 * time.Millisecond

// connect returns both ends of a connection whose accepted one is watched.
func connectWatched(t *testing.T) (accepted net.Conn, peer *net.TCPConn) {
	t.Helper()
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := watchPeers(t.Context(), plain, testCheck)
	t.Cleanup(func() { l.Close() })
	conn, err := net.Dial("tcp", plain.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); accepted.Close() })
	return accepted, conn.(*net.TCPConn)
}

// vanish makes the peer's kernel throw away whatever comes for it, as if its
// machine were gone.
func vanish(t *testing.T, peer *net.TCPConn) {
	t.Helper()
	err := control(peer, func(fd int) {
		drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0}
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop}); err != nil {
			t.Skipf("this kernel cannot drop a socket's packets: %v", err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// fill writes until the connection takes no more, or fails.
func fill(conn net.Conn) (written chan int, failed chan error) {
	written, failed = make(chan int, 1), make(chan error, 1)
	go func() {
		n, err := conn.Write(bytes.Repeat([]byte("output\n"), 4<<20)) // 28 MiB
		written <- n
		failed <- err
	}()
	return written, failed
}

func TestAPeerThatIsGoneWithoutAWordIsNoticed(t *testing.T) {
	for _, tc := range []struct {
		name   string
		before time.Duration // how long the writer waits before the peer goes
	}{
		{"while data is under way", 0},
		{"after it had stopped reading", testCheck},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			accepted, peer := connectWatched(t)
			if tc.before == 0 {
				vanish(t, peer)
			}
			_, failed := fill(accepted)
			if tc.before > 0 {
				time.Sleep(tc.before) // the time that the peer does not read
				vanish(t, peer)
			}
			select {
			case err := <-failed:
				if err == nil {
					t.Error("the whole output was taken by nobody")
				}
			case <-time.After(40 * time.Second):
				t.Fatal("the connection still stands")
			}
		})
	}
	t.Run("when little was said to it", func(t *testing.T) {
		t.Parallel()
		accepted, peer := connectWatched(t)
		vanish(t, peer)
		if _, err := accepted.Write([]byte("are you there?")); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() {
			_, err := accepted.Read(make([]byte, 1))
			ended <- err
		}()
		select {
		case <-ended:
		case <-time.After(40 * time.Second):
			t.Fatal("the connection still stands")
		}
	})
}

func TestAPeerThatReadsNothingForLongIsLeftAlone(t *testing.T) {
	t.Parallel()
	accepted, peer := connectWatched(t)
	written, failed := fill(accepted)
	select {
	case err := <-failed:
		t.Fatalf("the write ended: %v", err)
	case <-time.After(16 * testCheck): // the time that the peer does not read
	}
	got := 0
	for buf := make([]byte, 64<<10); got < 28<<20; {
		n, err := peer.Read(buf)
		for i, b := range buf[:n] {
			if b != "output\n"[(got+i)%7] {
				t.Fatalf("byte %d is %q", got+i, b)
			}
		}
		got += n
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if n, err := <-written, <-failed; err != nil || n != 28<<20 || got != n {
		t.Errorf("wrote %d, %v, and read %d", n, err, got)
	}
}
