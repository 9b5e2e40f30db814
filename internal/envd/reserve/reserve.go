// Package reserve keeps back for the agent what the programs of the sandbox can
// use up: threads and memory. With it the agent still answers, and ends what is
// out of hand, when they have taken all that they can get.
package reserve

import (
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync"
)

const (
	// threads are made before the agent serves: Go ends the program when the
	// system refuses it one, which a full process table does. Each request in a
	// file operation holds one, and the runtime has a handful of its own.
	threads = 24
	// heap is what the agent stays below as long as it can, in bytes, by
	// collecting its garbage more often. It is far more than it needs.
	heap = 128 << 20
)

// Take takes the agent's share of threads and memory, before it serves. What the
// system refuses is left out.
func Take() {
	debug.SetMemoryLimit(heap)
	makeThreads(threads)
	lockText()
}

// makeThreads has the runtime make n threads and keep them for when it needs some.
func makeThreads(n int) {
	var started, done sync.WaitGroup
	leave := make(chan struct{})
	for range n {
		started.Add(1)
		done.Go(func() {
			// A goroutine that is tied to its thread takes one for itself alone.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread() // which keeps the thread
			started.Done()
			<-leave
		})
	}
	started.Wait()
	close(leave)
	done.Wait()
}

// IgnoreSignals takes all signals away from Go's defaults, which end the program
// for most of them. In a container the agent is pid 1, and whoever is root there
// can send it any; only its runtime ends it, from outside. Signals that are
// asked for elsewhere, like that for ended children, still arrive there.
func IgnoreSignals() {
	signal.Notify(make(chan os.Signal, 1)) // nobody reads it, so they are dropped
}
