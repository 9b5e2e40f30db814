package proxy

import (
	"net/http"
	"net/url"
)

// exchangeGRPC is exchange over HTTP/2, which gRPC needs: its calls end with a
// trailer, and both sides talk at the same time.
func (p *Proxy) exchangeGRPC(s *stream, r *http.Request) error {
	out := &http.Request{
		Method: r.Method, Host: s.host, Header: make(http.Header, len(r.Header)+4),
		Proto: "HTTP/2.0", ProtoMajor: 2,
		URL: &url.URL{Scheme: "http", Host: s.hop.String(), Opaque: s.hopPrefix + s.target.path, RawQuery: s.target.query, ForceQuery: s.target.hasQuery},
		// Its length is never known: a call ends when its client says so. Only answers
		// of gRPC have trailers.
		ContentLength: -1,
	}
	if s.upload != nil {
		out.Body, out.ContentLength = s.upload, r.ContentLength
	} else {
		out.ContentLength = 0
	}
	s.eachHeader(r, func(name, value string) { out.Header.Add(name, value) })
	if out.Header.Get("User-Agent") == "" {
		out.Header["User-Agent"] = nil // keeps net/http from making one up
	}
	res, err := p.grpcTransport(s.guest).RoundTrip(out.WithContext(s.ctx))
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if s.isAborted() {
		return errEvicted
	}
	s.respond(res, source{body: res.Body})
	return nil
}
