package proxy

import (
	"net/http"
	"strconv"
	"strings"
)

// malformed says what is wrong with a request that net/http has let through and
// that must not go on as HTTP/1.1; empty for nothing.
func malformed(r *http.Request) string {
	if r.Method == "" || strings.Trim(r.Method, tokenCharacters) != "" {
		return "The method is malformed" // HTTP/2 has it in a field of its own, with room for a whole request
	}
	if lengths := r.Header["Content-Length"]; r.ProtoMajor >= 2 && len(lengths) > 0 {
		// There net/http takes what it cannot read for no body at all.
		if len(lengths) > 1 || lengths[0] != strconv.FormatInt(r.ContentLength, 10) {
			return "The content length is malformed"
		}
	}
	return ""
}

// tokenCharacters make up methods and header names (RFC 9110, 5.6.2).
const tokenCharacters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+-.^_`|~"

// closesOld ends the connection of an HTTP/1.0 client after the answer. net/http
// takes no notice of a transfer coding there, so what follows a body may be the
// rest of it (RFC 9112, 6.1 says to close for that reason).
func closesOld(w http.ResponseWriter, r *http.Request) {
	if !r.ProtoAtLeast(1, 1) {
		w.Header().Set("Connection", "close")
	}
}

// applicationTrailer returns what a client has sent behind its body as the
// application gets it: nothing that frames or routes a request, or that the proxy
// guards.
func applicationTrailer(sent http.Header) http.Header {
	var trailer http.Header
	for name, values := range sent {
		switch {
		case hopByHop[name], name == "Content-Length", name == "Host", name == "Cookie", name == HeaderTrafficToken, speaksForProxy(name):
			continue
		}
		if trailer == nil {
			trailer = make(http.Header, len(sent))
		}
		trailer[name] = values
	}
	return trailer
}
