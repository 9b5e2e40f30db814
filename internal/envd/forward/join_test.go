package forward

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair connects from outside to a listener on the loopback and returns both ends.
func (w *world) pair(t *testing.T, l *net.TCPListener) (outer, inner *net.TCPConn) {
	t.Helper()
	accepted := make(chan *net.TCPConn, 1)
	go func() {
		c, err := l.AcceptTCP()
		if err != nil {
			close(accepted)
			return
		}
		accepted <- c
	}()
	outer = w.mustDial(t, guest4+":"+strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
	inner, ok := <-accepted
	if !ok {
		t.Fatal("nobody came")
	}
	t.Cleanup(func() { inner.Close() })
	return outer, inner
}

// forwarded is a listener on the loopback that is reached from outside.
func (w *world) forwarded(t *testing.T) *net.TCPListener {
	t.Helper()
	l := w.listen(t, "127.0.0.1:3000")
	w.eventually(t, "reachable", func() bool {
		if !w.reaches(guest4 + ":3000") {
			return false
		}
		c, err := l.AcceptTCP() // that of the attempt
		must(t, err)
		c.Close()
		return true
	})
	return l
}

func TestTransfersArriveAsTheyWereSentInBothDirections(t *testing.T) {
	const size = 256 << 20
	w := newWorld(t, "redirect")
	outer, inner := w.pair(t, w.forwarded(t))
	var all sync.WaitGroup
	transfer := func(from, to *net.TCPConn, seed byte) {
		sent, got := sha256.New(), sha256.New()
		var both sync.WaitGroup
		both.Go(func() {
			source := rand.NewChaCha8([32]byte{seed})
			if _, err := io.Copy(io.MultiWriter(from, sent), io.LimitReader(source, size)); err != nil {
				t.Error(err)
			}
			from.CloseWrite()
		})
		both.Go(func() {
			if n, err := io.Copy(got, to); n != size || err != nil {
				t.Errorf("got %d bytes, %v", n, err)
			}
		})
		both.Wait()
		if !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
			t.Error("what came is not what was sent")
		}
	}
	all.Go(func() { transfer(outer, inner, 1) })
	all.Go(func() { transfer(inner, outer, 2) })
	all.Wait()
}

func TestAnEndOfStreamPassesInOneDirectionAlone(t *testing.T) {
	w := newWorld(t, "redirect")
	l := w.forwarded(t)
	for _, outerFirst := range []bool{true, false} {
		first, second := w.pair(t, l)
		if !outerFirst {
			first, second = second, first
		}
		_, err := io.WriteString(first, "question")
		must(t, err)
		must(t, first.CloseWrite())
		got, err := io.ReadAll(second) // ends although first is still open
		if string(got) != "question" || err != nil {
			t.Fatalf("got %q, %v", got, err)
		}
		_, err = io.WriteString(second, "answer")
		must(t, err)
		must(t, second.Close())
		got, err = io.ReadAll(first)
		if string(got) != "answer" || err != nil {
			t.Fatalf("got %q, %v", got, err)
		}
	}
}

func TestAResetPassesOn(t *testing.T) {
	w := newWorld(t, "redirect")
	l := w.forwarded(t)
	for _, outerFirst := range []bool{true, false} {
		first, second := w.pair(t, l)
		if !outerFirst {
			first, second = second, first
		}
		reset(first)
		if _, err := second.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("outer end first %t: the other got %v, want it reset", outerFirst, err)
		}
	}
}

func TestTheApplicationSeesALocalPeer(t *testing.T) {
	w := newWorld(t, "redirect")
	_, inner := w.pair(t, w.forwarded(t))
	if ip := inner.RemoteAddr().(*net.TCPAddr).IP; !ip.IsLoopback() {
		t.Errorf("the peer is %v, want a loopback address", ip)
	}
}

func TestASenderWaitsForAReaderThatDoesNotRead(t *testing.T) {
	w := newWorld(t, "redirect")
	outer, _ := w.pair(t, w.forwarded(t))
	before := w.memory(t)
	must(t, outer.SetWriteDeadline(time.Now().Add(2*time.Second)))
	n, err := io.CopyN(outer, rand.NewChaCha8([32]byte{}), 1<<30)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("sent %d bytes to somebody who reads none: %v", n, err)
	}
	if grown := w.memory(t) - before; grown > 16<<20 { // of a GiB; the race detector takes its share
		t.Errorf("the forwarder grew by %d bytes", grown)
	}
}

func TestAThousandConnectionsAtOnceAndNothingIsKept(t *testing.T) {
	w := newWorld(t, "redirect")
	l := w.forwarded(t)
	descriptors, memory := w.descriptors(t), w.memory(t)
	for range 3 {
		var outers, inners [1000]*net.TCPConn
		for i := range outers {
			outers[i], inners[i] = w.pair(t, l)
		}
		t.Logf("with 1,000 connections: %d descriptors, %d KiB", w.descriptors(t), w.memory(t)>>10)
		for i, c := range outers {
			_, err := fmt.Fprint(c, i)
			must(t, err)
			must(t, c.CloseWrite())
		}
		for i, c := range inners {
			got, err := io.ReadAll(c)
			if string(got) != strconv.Itoa(i) || err != nil {
				t.Fatalf("connection %d got %q, %v", i, got, err)
			}
			c.Close()
			outers[i].Close()
		}
		w.eventually(t, "descriptors are given back", func() bool { return w.descriptors(t) <= descriptors })
	}
	t.Logf("memory before %d KiB, after %d KiB", memory>>10, w.memory(t)>>10)
}

// descriptors counts what the forwarder has open.
func (w *world) descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", w.forwarder.Process.Pid))
	must(t, err)
	return len(entries)
}

// memory is the forwarder's resident memory in bytes.
func (w *world) memory(t *testing.T) int {
	t.Helper()
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", w.forwarder.Process.Pid))
	must(t, err)
	var size, resident int
	_, err = fmt.Sscan(string(statm), &size, &resident)
	must(t, err)
	return resident * os.Getpagesize()
}
