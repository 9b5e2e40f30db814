package process

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	rpc "github.com/wrenn/wrenn/api/proto/process"
)

func TestEndedProcessesAreKeptForAWhileAndNotTooMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var tab table
		end := func(pid int) *entry {
			e := &entry{Process: &Process{pid: pid, out: newOutput()}}
			tab.add(e)
			tab.retire(e)
			return e
		}
		find := func(pid uint32) *entry {
			return tab.find(&rpc.ProcessSelector{Selector: &rpc.ProcessSelector_Pid{Pid: pid}}, true)
		}
		kept := func() []*entry {
			tab.mu.Lock()
			defer tab.mu.Unlock()
			return slices.Clone(tab.ended)
		}
		first := end(1)
		time.Sleep(keepEnded - time.Second)
		second := end(2)
		if find(1) != first || find(2) != second {
			t.Fatal("an ended process was forgotten too soon")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if find(1) != nil || find(2) != second {
			t.Fatal("want the first forgotten and the second kept")
		}
		time.Sleep(keepEnded)
		synctest.Wait()
		if find(2) != nil || len(kept()) != 0 {
			t.Fatal("want all forgotten")
		}
		for pid := range maxEnded + 10 {
			end(100+pid).out.write(stdout, make([]byte, keepOutput/2))
		}
		if len(kept()) != maxEnded {
			t.Errorf("%d are kept", len(kept()))
		}
		held := 0
		for _, e := range kept() {
			held += e.out.held()
		}
		if held > maxEndedOutput+keepOutput {
			t.Errorf("they hold %d bytes of output", held)
		}
		time.Sleep(keepEnded)
		synctest.Wait()
		if len(kept()) != 0 {
			t.Error("want all forgotten")
		}
	})
}

func TestOfSeveralProcessesWithOneTagTheYoungestIsMeant(t *testing.T) {
	var tab table
	tag := "x"
	add := func(pid int) *entry {
		e := &entry{Process: &Process{pid: pid, out: newOutput()}, tag: &tag}
		tab.add(e)
		return e
	}
	find := func() *entry {
		return tab.find(&rpc.ProcessSelector{Selector: &rpc.ProcessSelector_Tag{Tag: tag}}, true)
	}
	older := add(32_000)
	younger := add(300) // the kernel's numbers begin anew
	if find() != younger {
		t.Error("an older one was found")
	}
	tab.retire(younger)
	if find() != older {
		t.Error("want the one that lives still")
	}
}

func TestOutputGivesWayOnlyWhenNobodyReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutput()
		chunk := make([]byte, maxChunk)
		for range 100 {
			o.write(stdout, chunk) // nobody reads: never waits
		}
		r, err := o.attach(place{offset: new(int64)})
		if err != nil {
			t.Fatal(err)
		}
		if kept := o.end - r.start; kept > keepOutput+maxChunk || kept < keepOutput || r.lost != r.start {
			t.Errorf("%d bytes are kept, %d lost", kept, r.lost)
		}
		written := make(chan struct{})
		go func() {
			defer close(written)
			o.write(stderr, chunk)
			o.write(stderr, chunk)
		}()
		synctest.Wait()
		select {
		case <-written:
			t.Fatal("what an attached reader has not had was dropped")
		default:
		}
		start, n := r.offset, 0
		for {
			_, data, _, _ := r.next()
			synctest.Wait()
			if len(data) == 0 {
				break
			}
			n += len(data)
		}
		<-written
		if int64(n) != o.end-start {
			t.Errorf("got %d of %d bytes", n, o.end-start)
		}
		go func() {
			for range 100 {
				o.write(stdout, chunk)
			}
		}()
		synctest.Wait()
		r.detach() // lets the writer go on
		synctest.Wait()
		if o.end != start+int64(n)+100*maxChunk {
			t.Errorf("the writer still waits at %d", o.end)
		}
		o.finish(End{Code: 3})
		late, _ := o.attach(place{})
		if _, data, end, _ := late.next(); len(data) != 0 || end == nil || end.Code != 3 {
			t.Errorf("a late reader gets %d bytes and %v", len(data), end)
		}
	})
}
