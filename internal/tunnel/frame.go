package tunnel

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"sync"
)

// Opcodes of RFC 6455, 5.2.
const (
	opContinuation = 0x0
	opText         = 0x1
	opBinary       = 0x2
	opClose        = 0x8
	opPing         = 0x9
	opPong         = 0xa

	maxHeader  = 14
	maxControl = 125
)

// frames lends what frames are put together in.
var frames = sync.Pool{New: func() any { return new([maxHeader + maxFrame]byte) }}

// appendFrame appends a whole message. Clients mask what they send.
func appendFrame(b []byte, op byte, payload []byte, masked bool) []byte {
	bit := byte(0)
	if masked {
		bit = 0x80
	}
	b = append(b, 0x80|op)
	switch n := len(payload); {
	case n <= 125:
		b = append(b, bit|byte(n))
	case n <= 0xffff:
		b = binary.BigEndian.AppendUint16(append(b, bit|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, bit|127), uint64(n))
	}
	if !masked {
		return append(b, payload...)
	}
	var key [4]byte
	_, _ = rand.Read(key[:]) // never fails
	b = append(b, key[:]...)
	b = append(b, payload...)
	mask(b[len(b)-len(payload):], key, 0)
	return b
}

// mask masks b, or unmasks it, from position pos of the payload on.
func mask(b []byte, key [4]byte, pos int64) {
	var turned [8]byte
	for i := range turned {
		turned[i] = key[(pos+int64(i))&3]
	}
	word := binary.LittleEndian.Uint64(turned[:])
	for len(b) >= 8 {
		binary.LittleEndian.PutUint64(b, binary.LittleEndian.Uint64(b)^word)
		b = b[8:]
	}
	for i := range b {
		b[i] ^= turned[i]
	}
}

func closePayload(code uint16, reason string) []byte {
	return append(binary.BigEndian.AppendUint16(nil, code), reason...)
}

// violation is something that the other end must not send.
type violation struct {
	code   uint16
	reason string
}

func (v *violation) Error() string { return "the other end of the tunnel " + v.reason }

func malformed(reason string) error { return &violation{CodeProtocolError, reason} }

// errDone is what decode returns for a close with CodeDone.
var errDone = errors.New("the other end wants no more")

// events are what else there is in a tunnel than bytes.
type events interface {
	end()
	ping(payload []byte)
}

// decoder takes frames apart, in whatever pieces they come.
type decoder struct {
	client bool // this end is the client: what comes must not be masked

	header [maxHeader]byte
	filled int // of header

	// The current frame, once its header is complete:
	inside bool
	op     byte
	fin    bool
	masked bool
	key    [4]byte
	length int64
	pos    int64 // bytes of its payload that have come

	message byte             // opcode of the current message; 0 between messages
	size    int64            // of the current message so far
	ended   bool             // the end of the direction has come
	control [maxControl]byte // the payload of a control frame
}

// decode takes what came, leaves the bytes that were carried at its beginning and
// returns how many they are. After an error nothing more can be decoded.
func (d *decoder) decode(b []byte, on events) (n int, err error) {
	for at := 0; ; {
		if !d.inside {
			used, err := d.fillHeader(b[at:])
			if at += used; err != nil || !d.inside {
				return n, err
			}
		}
		part := b[at : at+int(min(int64(len(b)-at), d.length-d.pos))]
		if d.masked {
			mask(part, d.key, d.pos)
		}
		if d.op >= opClose {
			copy(d.control[d.pos:], part)
		} else {
			n += copy(b[n:], part)
		}
		at += len(part)
		d.pos += int64(len(part))
		if d.pos < d.length {
			return n, nil
		}
		d.inside, d.filled = false, 0
		if err := d.complete(on); err != nil {
			return n, err
		}
	}
}

// fillHeader collects a header and reads it once it is complete. It returns how
// much of b belonged to it.
func (d *decoder) fillHeader(b []byte) (used int, err error) {
	for {
		want := d.headerLength()
		n := copy(d.header[d.filled:want], b[used:])
		used += n
		if d.filled += n; d.filled < want {
			return used, nil
		}
		if d.headerLength() == want {
			break
		}
	}
	d.inside, d.pos = true, 0
	return used, d.readHeader()
}

// headerLength is how long the header is, by what is there of it.
func (d *decoder) headerLength() int {
	if d.filled < 2 {
		return 2
	}
	n := 2
	switch d.header[1] & 0x7f {
	case 126:
		n += 2
	case 127:
		n += 8
	}
	if d.header[1]&0x80 != 0 {
		n += 4
	}
	return n
}

func (d *decoder) readHeader() error {
	h := d.header[:d.filled]
	d.fin, d.op, d.masked = h[0]&0x80 != 0, h[0]&0x0f, h[1]&0x80 != 0
	if d.masked {
		d.key = [4]byte(h[len(h)-4:])
	}
	switch n := h[1] & 0x7f; n {
	case 126:
		d.length = int64(binary.BigEndian.Uint16(h[2:]))
	case 127:
		d.length = int64(binary.BigEndian.Uint64(h[2:]))
	default:
		d.length = int64(n)
	}
	switch {
	case h[0]&0x70 != 0:
		return malformed("set reserved bits")
	case d.masked == d.client:
		return malformed("masks where it must not, or does not where it must")
	case d.length < 0:
		return malformed("sent an impossible length")
	case d.op >= opClose:
		if d.length > maxControl || !d.fin {
			return malformed("sent a control frame that is too long or in parts")
		}
		return nil
	}
	return d.beginData()
}

// beginData checks the header of a frame that is, or is a part of, a message.
func (d *decoder) beginData() error {
	switch {
	case d.op > opBinary:
		return malformed("sent a frame of an unknown kind")
	case (d.op == opContinuation) != (d.message != 0):
		return malformed("mixes the parts of its messages up")
	}
	if d.op != opContinuation {
		d.message, d.size = d.op, 0
	}
	d.size += min(d.length, MaxMessage+1) // cannot overflow this way
	switch {
	case d.message == opText && d.size > 0:
		return &violation{CodeUnsupported, "sent text: bytes go in binary messages, and an empty text message ends a direction"}
	case d.size > MaxMessage:
		return &violation{CodeTooLarge, "sent a message that is too large"}
	case d.ended && d.size > 0:
		return malformed("sent bytes after the end of its direction")
	}
	return nil
}

// complete acts on a frame that has come whole.
func (d *decoder) complete(on events) error {
	switch d.op {
	case opPing:
		on.ping(d.control[:d.pos])
	case opPong:
	case opClose:
		return d.closed(d.control[:d.pos])
	case opContinuation, opText, opBinary:
		if !d.fin {
			return nil
		}
		if d.message == opText && !d.ended {
			d.ended = true
			on.end()
		}
		d.message = 0
	default:
		return malformed("sent a control frame of an unknown kind")
	}
	return nil
}

func (d *decoder) closed(payload []byte) error {
	if len(payload) == 0 {
		return errDone
	}
	if len(payload) == 1 {
		return malformed("sent half a close code")
	}
	code := binary.BigEndian.Uint16(payload)
	if code == CodeDone {
		return errDone
	}
	return &CloseError{Code: code, Reason: string(payload[2:])}
}
