package envd

import (
	"context"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// peerCheck is how often connections are looked at.
	peerCheck = 15 * time.Second
	// peerChecks is how many times running a peer may be found to owe an answer:
	// the last time it is gone, 45 to 60 s after what it did not answer.
	peerChecks = 4
	// maxUnsent bounds what the kernel takes of a connection's data before it can
	// be sent, in bytes. What is in there is lost to a client whose connection
	// breaks: much less than a process's output that is kept for it.
	maxUnsent = 256 << 10
)

// peerListener closes the connections of peers that are gone without a word: a
// machine that lost power, a network that vanished. TCP itself would retry for a
// quarter of an hour, and as long a client that does not read holds a process up.
// A peer that is there but reads nothing, however long, is left alone; that is
// why no timeout of the kernel will do, which cannot tell the two apart.
type peerListener struct {
	net.Listener

	mu    sync.Mutex
	conns map[*net.TCPConn]int // checks running that found the peer to owe an answer
}

// watchPeers returns a listener that watches the connections of l until ctx ends.
func watchPeers(ctx context.Context, l net.Listener, every time.Duration) *peerListener {
	p := &peerListener{Listener: l, conns: make(map[*net.TCPConn]int)}
	go p.watch(ctx, every)
	return p
}

func (l *peerListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	tcp, ok := conn.(*net.TCPConn)
	if err != nil || !ok {
		return conn, err
	}
	// A silent connection is asked after 15 s, and gone after three more times.
	_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: peerCheck, Interval: peerCheck, Count: 3})
	_ = control(tcp, func(fd int) { _ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, maxUnsent) })
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns[tcp] = 0
	return tcp, nil // as it is: others need all that it can
}

func (l *peerListener) watch(ctx context.Context, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			for _, c := range l.gone(every) {
				_ = c.SetLinger(0) // nobody takes what is still to be sent
				_ = c.Close()
			}
		}
	}
}

// gone returns the connections whose peer has owed an answer for too long. Those
// that have been closed are forgotten.
func (l *peerListener) gone(every time.Duration) []*net.TCPConn {
	l.mu.Lock()
	defer l.mu.Unlock()
	var gone []*net.TCPConn
	for c, times := range l.conns {
		owed := false
		err := control(c, func(fd int) {
			info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
			owed = err == nil && owesAnswer(info, every)
		})
		switch {
		case err != nil: // closed
			delete(l.conns, c)
		case !owed:
			l.conns[c] = 0
		case times+1 >= peerChecks:
			gone = append(gone, c)
		default:
			l.conns[c] = times + 1
		}
	}
	return gone
}

// owesAnswer says whether the peer has been silent for that long although it was
// sent what any living one answers at once: data, or the question whether it has
// room for data again. Linux counts such questions only until an answer comes.
func owesAnswer(info *unix.TCPInfo, silence time.Duration) bool {
	asked := info.Unacked > 0 || info.Probes > 0
	return asked && time.Duration(info.Last_ack_recv)*time.Millisecond >= silence
}

func control(c *net.TCPConn, f func(fd int)) error {
	conn, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Control(func(fd uintptr) { f(int(fd)) })
}
