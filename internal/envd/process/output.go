package process

import (
	"sort"
	"sync"
)

// kind says which of its outputs a process wrote to.
type kind uint8

const (
	stdout kind = iota
	stderr
	terminal
)

const (
	// keepOutput is how much of a process's output is kept, in bytes.
	keepOutput = 1 << 20
	// maxChunk is the most that one event carries, in bytes.
	maxChunk = 32 << 10
	// chunkOverhead is added for every chunk when output is counted, so that a
	// program that writes single bytes cannot make us hold many times keepOutput.
	chunkOverhead = 64
)

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
	size    int     // bytes in chunks, overhead included
	end     int64   // offset of the next byte
	ended   *End
	readers map[*reader]struct{}
	room    chan struct{} // closed when a waiting writer should look again; nil while none waits
}

// reader is one client's position in the output.
type reader struct {
	out    *output
	offset int64
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
		if o.makeRoom(len(data) + chunkOverhead) {
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
	for o.size+n > keepOutput && len(o.chunks) > 0 {
		oldest := o.chunks[0]
		for r := range o.readers {
			if r.offset < oldest.end() {
				return false
			}
		}
		o.size -= len(oldest.data) + chunkOverhead
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
	o.size += len(data) + chunkOverhead
	o.end += int64(len(data))
}

func (o *output) wakeReaders() {
	for r := range o.readers {
		select {
		case r.wake <- struct{}{}:
		default:
		}
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

// held returns how much memory the output takes, in bytes.
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

// attach adds a reader that gets everything kept from the offset on, or only
// what is written from now on when live is true. Its detach must be called.
func (o *output) attach(offset int64, live bool) *reader {
	o.mu.Lock()
	defer o.mu.Unlock()
	first := o.end
	if len(o.chunks) > 0 {
		first = o.chunks[0].offset
	}
	if live {
		offset = o.end
	}
	r := &reader{out: o, offset: min(max(offset, first), o.end), wake: make(chan struct{}, 1)}
	o.readers[r] = struct{}{}
	return r
}

func (r *reader) detach() {
	r.out.mu.Lock()
	defer r.out.mu.Unlock()
	delete(r.out.readers, r)
	r.out.wakeWriters()
}

// next returns output that the reader has not had yet; none when it has to wait
// for wake, or when end is set: then there will be no more.
func (r *reader) next() (k kind, data []byte, end *End) {
	o := r.out
	o.mu.Lock()
	defer o.mu.Unlock()
	if r.offset == o.end {
		return 0, nil, o.ended
	}
	i := sort.Search(len(o.chunks), func(i int) bool { return o.chunks[i].end() > r.offset })
	c := o.chunks[i]
	data = c.data[r.offset-c.offset:]
	r.offset = c.end()
	o.wakeWriters()
	return c.kind, data, nil
}
