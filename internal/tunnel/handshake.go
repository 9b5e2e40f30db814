package tunnel

import (
	"crypto/rand"
	"crypto/sha1" //nolint:gosec // RFC 6455 has it so; it protects nothing
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// version is the one of the WebSocket protocol (RFC 6455, 4.1).
const version = "13"

// Asked reports whether a request is for a tunnel.
func Asked(r *http.Request) bool {
	return (r.Method == http.MethodGet && hasToken(r.Header, "Upgrade", "websocket") || extended(r)) &&
		hasToken(r.Header, "Sec-Websocket-Protocol", Protocol)
}

// extended reports whether a request asks for a WebSocket over HTTP/2 (RFC 8441),
// where a good part of the handshake falls away. net/http has the pseudo-header
// among the others.
func extended(r *http.Request) bool {
	return r.Method == http.MethodConnect && slices.Equal(r.Header[":protocol"], []string{"websocket"})
}

// Ask makes h the header of a request for a tunnel. The key it returns is for Check.
func Ask(h http.Header) (key string) {
	var nonce [16]byte
	_, _ = rand.Read(nonce[:]) // never fails
	key = base64.StdEncoding.EncodeToString(nonce[:])
	h.Set("Connection", "Upgrade")
	h.Set("Upgrade", "websocket")
	h.Set("Sec-WebSocket-Version", version)
	h.Set("Sec-WebSocket-Key", key)
	h.Set("Sec-WebSocket-Protocol", Protocol)
	return key
}

// Check reports what is wrong with the answer to a request made by Ask.
func Check(res *http.Response, key string) error {
	switch {
	case res.StatusCode != http.StatusSwitchingProtocols:
		return fmt.Errorf("the answer to the request for a tunnel is %s", res.Status)
	case res.Header.Get("Sec-WebSocket-Accept") != acceptKey(key), !hasToken(res.Header, "Upgrade", "websocket"):
		return errors.New("the answer to the request for a tunnel is no proper WebSocket handshake")
	case res.Header.Get("Sec-WebSocket-Protocol") != Protocol:
		return errors.New("the WebSocket is no tunnel: something else than the platform has answered")
	}
	return nil
}

// Agree makes h the header of the answer to a request for a tunnel, whose status is
// 101, or 200 over HTTP/2. The error says what is wrong with the request.
func Agree(r *http.Request, h http.Header) error {
	if r.Header.Get("Sec-WebSocket-Version") != version {
		return errors.New("the WebSocket handshake is not of version " + version)
	}
	h.Set("Sec-WebSocket-Protocol", Protocol)
	if extended(r) {
		return nil
	}
	keys := r.Header.Values("Sec-WebSocket-Key")
	switch {
	case !r.ProtoAtLeast(1, 1) || !hasToken(r.Header, "Connection", "upgrade"):
		return errors.New("the WebSocket handshake lacks `Connection: Upgrade` or HTTP/1.1")
	case len(keys) != 1:
		return errors.New("the WebSocket handshake must have one Sec-WebSocket-Key")
	}
	if nonce, err := base64.StdEncoding.DecodeString(keys[0]); err != nil || len(nonce) != 16 {
		return errors.New("the Sec-WebSocket-Key of the WebSocket handshake is not 16 bytes in base64")
	}
	h.Set("Connection", "Upgrade")
	h.Set("Upgrade", "websocket")
	h.Set("Sec-WebSocket-Accept", acceptKey(keys[0]))
	return nil
}

func acceptKey(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) //nolint:gosec // see the import
	return base64.StdEncoding.EncodeToString(sum[:])
}

func hasToken(h http.Header, name, token string) bool {
	for _, line := range h.Values(name) {
		for item := range strings.SplitSeq(line, ",") {
			if strings.EqualFold(strings.TrimSpace(item), token) {
				return true
			}
		}
	}
	return false
}
