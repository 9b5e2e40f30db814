package process

import (
	"errors"
	"fmt"
	"sort"
	"sync"

	"connectrpc.com/connect"
)

// kind says which of its outputs a process wrote to.
type kind uint8

const (
	stdout kind = iota
	stderr
	terminal
)

const (
	// keepOutput is how much of a process's output is kept at least, in bytes.
	keepOutput = 1 << 20
	// maxChunk is the most that one event carries, in bytes.
	maxChunk = 32 << 10
	// maxChunks bounds what a program can make us hold that writes single bytes to
	// stdout and stderr in turn. Output in pieces of 32 bytes still fits.
	maxChunks = 1 << 15
)

// errTakenOver ends the stream of a client when another one wanted the process
// for itself.
var errTakenOver = errors.New("another client has taken the process over")

// chunk is a run of output of one kind. Its bytes are never changed once they
// are there; more may be appended behind them.
type chunk struct {
	kind   kind
	offset int64 // of the first byte in everything the process wrote
	data   []byte
}

func (c chunk) end() int64 { return c.offset + int64(len(c.data)) }

// output is what a process wrote last, in the order it came, and who reads it.
// Nothing is taken away from an attached reader: while one lags behind by all
// that is kept, writers wait, and so does in the end the process. With no reader
// attached the oldest output gives way.
type output struct {
	mu      sync.Mutex
	chunks  []chunk // without gaps
	size    int     // bytes in chunks
	end     int64   // offset of the next byte
	ended   *End
	readers map[*reader]struct{}
	room    chan struct{} // closed when a waiting writer should look again; nil while none waits
}

// place is where in the output a client wants to begin.
type place struct {
	offset   *int64 // nil: with what is written from now on
	takeover bool   // all other readers go
}

// reader is one client's position in the output.
type reader struct {
	out    *output
	offset int64
	start  int64         // the offset it began at
	lost   int64         // bytes before start that were asked for and are gone
	ousted bool          // another reader has taken over
	wake   chan struct{} // receives after something has come
}

func newOutput() *output {
	return &output{readers: make(map[*reader]struct{})}
}

// write appends data, which may be reused afterwards. It waits for readers that
// lag; after the end it does nothing.
func (o *output) write(k kind, data []byte) {
	for {
		o.mu.Lock()
		if o.ended != nil {
			o.mu.Unlock()
			return
		}
		if o.makeRoom(len(data)) {
			o.append(k, data)
			o.wakeReaders()
			o.mu.Unlock()
			return
		}
		if o.room == nil {
			o.room = make(chan struct{})
		}
		room := o.room
		o.mu.Unlock()
		<-room
	}
}

// makeRoom drops old chunks until n more bytes fit; false when a reader still
// needs them.
func (o *output) makeRoom(n int) bool {
	for len(o.chunks) > 0 {
		oldest := o.chunks[0]
		if o.size+n-len(oldest.data) < keepOutput && len(o.chunks) < maxChunks {
			break
		}
		for r := range o.readers {
			if r.offset < oldest.end() {
				return false
			}
		}
		o.size -= len(oldest.data)
		o.chunks[0] = chunk{}
		o.chunks = o.chunks[1:]
	}
	return true
}

func (o *output) append(k kind, data []byte) {
	if n := len(o.chunks); n > 0 {
		if last := &o.chunks[n-1]; last.kind == k && len(last.data)+len(data) <= maxChunk {
			last.data = append(last.data, data...)
			o.size += len(data)
			o.end += int64(len(data))
			return
		}
	}
	o.chunks = append(o.chunks, chunk{kind: k, offset: o.end, data: append([]byte(nil), data...)})
	o.size += len(data)
	o.end += int64(len(data))
}

func (o *output) wakeReaders() {
	for r := range o.readers {
		r.poke()
	}
}

func (o *output) wakeWriters() {
	if o.room != nil {
		close(o.room)
		o.room = nil
	}
}

// finish records how the process ended. Readers get it after all output.
func (o *output) finish(end End) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended = &end
	o.wakeReaders()
	o.wakeWriters()
}

// held returns how much output is kept, in bytes.
func (o *output) held() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.size
}

// discard gives up what is kept, unless somebody still reads it.
func (o *output) discard() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.readers) == 0 {
		o.chunks, o.size = nil, 0
	}
}

// attach adds a reader that gets everything kept from the place on; what is gone
// of it is counted as lost. A takeover is one step: between the last byte that
// the others could have had and the first of this reader nothing is missing, and
// nobody holds the process back any more but this reader. Its detach must be
// called.
func (o *output) attach(at place) (*reader, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	r := &reader{out: o, start: o.end, wake: make(chan struct{}, 1)}
	if at.offset != nil {
		wanted := *at.offset
		switch {
		case wanted < 0:
			return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("offset %d is negative", wanted))
		case wanted > o.end:
			return nil, connect.NewError(connect.CodeOutOfRange,
				fmt.Errorf("offset %d is beyond the output, which has %d bytes so far", wanted, o.end))
		}
		r.start = max(wanted, o.first())
		r.lost = r.start - wanted
	}
	r.offset = r.start
	if at.takeover {
		for other := range o.readers {
			other.ousted = true
			delete(o.readers, other)
			other.poke()
		}
		o.wakeWriters()
	}
	o.readers[r] = struct{}{}
	return r, nil
}

// first returns the offset of the first byte that is kept.
func (o *output) first() int64 {
	if len(o.chunks) == 0 {
		return o.end
	}
	return o.chunks[0].offset
}

func (r *reader) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *reader) detach() {
	r.out.mu.Lock()
	defer r.out.mu.Unlock()
	delete(r.out.readers, r)
	r.out.wakeWriters()
}

// next returns output that the reader has not had yet; none when it has to wait
// for wake, or when end is set: then there will be no more. The error is
// errTakenOver.
func (r *reader) next() (k kind, data []byte, end *End, err error) {
	o := r.out
	o.mu.Lock()
	defer o.mu.Unlock()
	if r.ousted {
		return 0, nil, nil, errTakenOver
	}
	if r.offset == o.end {
		return 0, nil, o.ended, nil
	}
	i := sort.Search(len(o.chunks), func(i int) bool { return o.chunks[i].end() > r.offset })
	c := o.chunks[i]
	data = c.data[r.offset-c.offset:]
	r.offset = c.end()
	o.wakeWriters()
	return c.kind, data, nil, nil
}
