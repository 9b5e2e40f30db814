package proxy

import (
	"io"
	"net/http"
	"strings"
)

// source is where the body of an answer comes from.
type source struct {
	body     io.Reader
	buffered func() int // bytes of it that are here already; nil: not known
}

// respond sends the answer to the client: what comes is passed on before the next
// piece is waited for. It panics with http.ErrAbortHandler when the answer breaks
// off after its header was sent.
func (s *stream) respond(res *http.Response, from source) {
	s.fromGuest = true
	copyAnswerHeader(s.Header(), res)
	s.rewriteAnswer()
	for name := range res.Trailer {
		s.Header().Add("Trailer", name)
	}
	announced := len(res.Trailer)
	s.WriteHeader(res.StatusCode)
	if err := s.copyBody(res, from); err != nil {
		s.proxy.log.Debug("carry answer", "sandbox", s.dest.SandboxID, "port", s.dest.Port, "error", err)
		panic(http.ErrAbortHandler)
	}
	if len(res.Trailer) == 0 {
		return
	}
	s.flush() // an answer that has been given a length has no trailer
	prefix := ""
	if announced != len(res.Trailer) {
		prefix = http.TrailerPrefix
	}
	for name, values := range res.Trailer {
		for _, value := range values {
			s.Header().Add(prefix+name, value)
		}
	}
}

// copyAnswerHeader copies what is not between the guest and us alone.
func copyAnswerHeader(to http.Header, res *http.Response) {
	named := connectionOptions(res.Header)
	for name, values := range res.Header {
		if !hopByHop[name] && !named[name] {
			to[name] = values
		}
	}
}

func (s *stream) copyBody(res *http.Response, from source) error {
	left := res.ContentLength // < 0: not known
	if s.method == http.MethodHead {
		return nil
	}
	wait := func() bool { return from.buffered == nil || from.buffered() == 0 }
	if left != 0 && wait() {
		s.flush()
	}
	buf := s.proxy.buffers.Get()
	defer s.proxy.buffers.Put(buf)
	for {
		n, err := from.body.Read(buf)
		if n > 0 {
			if _, err := s.ResponseWriter.Write(buf[:n]); err != nil {
				return err
			}
			s.sent.Add(int64(n))
			left -= int64(n)
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
		if left != 0 && wait() {
			s.flush()
		}
	}
}

// flush sends what has been written. An error shows in the next write.
func (s *stream) flush() { _ = http.NewResponseController(s.ResponseWriter).Flush() }

// isGRPC reports whether a request is gRPC as such, which exists over HTTP/2 alone.
// (What calls itself gRPC-Web is made for HTTP/1.1.)
func isGRPC(r *http.Request) bool {
	if r.ProtoMajor != 2 {
		return false
	}
	kind := r.Header.Get("Content-Type")
	rest, ok := strings.CutPrefix(kind, "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}
