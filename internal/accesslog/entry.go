package accesslog

import (
	"strconv"
	"time"
	"unicode/utf8"
)

// Entry is what is said of one request. Its strings may be anything that a client
// sends: they are cut to a bounded length and escaped.
type Entry struct {
	Time     time.Time // at which the request came
	Sandbox  string
	Port     uint16
	Method   string
	Path     string // without the query, which may carry secrets
	Protocol string // "HTTP/1.1"
	Status   int    // 0: there was no answer
	Sent     int64  // bytes to the client, without headers
	Received int64  // bytes from the client, likewise
	Duration time.Duration
	Answer   time.Duration // until the answer's header; not said without an answer
	Client   string        // IP address
	Broken   bool          // the request ended before its proper end
}

// The most bytes of a string that are written; a path is what clients choose freely.
const (
	maxPath = 512
	maxWord = 64
)

// appendTo appends the line. It is written out by hand: this is done for every
// request, and reflection would take longer than all the rest of the accounting.
func (e *Entry) appendTo(b []byte) []byte {
	b = append(b, `{"time":"`...)
	b = appendTime(b, e.Time.UTC())
	b = append(b, `","sandbox":`...)
	b = appendString(b, e.Sandbox, maxWord)
	b = append(b, `,"port":`...)
	b = strconv.AppendUint(b, uint64(e.Port), 10)
	b = append(b, `,"method":`...)
	b = appendString(b, e.Method, maxWord)
	b = append(b, `,"path":`...)
	b = appendString(b, e.Path, maxPath)
	b = append(b, `,"protocol":`...)
	b = appendString(b, e.Protocol, maxWord)
	b = append(b, `,"status":`...)
	b = strconv.AppendInt(b, int64(e.Status), 10)
	b = append(b, `,"sent":`...)
	b = strconv.AppendInt(b, e.Sent, 10)
	b = append(b, `,"received":`...)
	b = strconv.AppendInt(b, e.Received, 10)
	b = append(b, `,"duration_ms":`...)
	b = appendMillis(b, e.Duration)
	if e.Status != 0 {
		b = append(b, `,"answer_ms":`...)
		b = appendMillis(b, e.Answer)
	}
	b = append(b, `,"client":`...)
	b = appendString(b, e.Client, maxWord)
	if e.Broken {
		b = append(b, `,"broken":true`...)
	}
	return append(b, '}', '\n')
}

// appendTime writes a time in UTC as RFC 3339 has it, with milliseconds.
func appendTime(b []byte, t time.Time) []byte {
	year, month, day := t.Date()
	hour, minute, second := t.Clock()
	b = append(appendDigits(b, year, 4), '-')
	b = append(appendDigits(b, int(month), 2), '-')
	b = append(appendDigits(b, day, 2), 'T')
	b = append(appendDigits(b, hour, 2), ':')
	b = append(appendDigits(b, minute, 2), ':')
	b = append(appendDigits(b, second, 2), '.')
	return append(appendDigits(b, t.Nanosecond()/1e6, 3), 'Z')
}

// appendMillis writes milliseconds with three decimals.
func appendMillis(b []byte, d time.Duration) []byte {
	us := max(d.Microseconds(), 0)
	b = strconv.AppendInt(b, us/1000, 10)
	return appendDigits(append(b, '.'), int(us%1000), 3)
}

// appendDigits writes the last digits of n.
func appendDigits(b []byte, n, digits int) []byte {
	b = append(b, "0000"[:digits]...)
	for i := len(b) - 1; digits > 0; i, digits = i-1, digits-1 {
		b[i] = byte('0' + n%10)
		n /= 10
	}
	return b
}

// appendString writes a JSON string of at most limit bytes of s. Whatever could
// act on a terminal or break a line is escaped, and what is no UTF-8 is replaced.
func appendString(b []byte, s string, limit int) []byte {
	cut := len(s) > limit
	if cut {
		for limit > 0 && !utf8.RuneStart(s[limit]) {
			limit--
		}
		s = s[:limit]
	}
	b = append(b, '"')
	plain := 0 // from where on s has been all plain
	for i := 0; i < len(s); {
		c := s[i]
		if c >= ' ' && c < 0x7f && c != '"' && c != '\\' {
			i++
			continue
		}
		r, size := utf8.DecodeRuneInString(s[i:])
		if c >= utf8.RuneSelf && r > 0x9f && r != '\u2028' && r != '\u2029' && (r != utf8.RuneError || size > 1) {
			i += size
			continue
		}
		b = append(b, s[plain:i]...)
		if c == '"' || c == '\\' {
			b = append(b, '\\', c)
		} else {
			b = append(b, '\\', 'u', hex[r>>12&15], hex[r>>8&15], hex[r>>4&15], hex[r&15])
		}
		i += size
		plain = i
	}
	b = append(b, s[plain:]...)
	if cut {
		b = append(b, "…"...)
	}
	return append(b, '"')
}

const hex = "0123456789abcdef"
