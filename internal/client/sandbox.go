package client

import (
	"context"
	"encoding/base64"
	"net/http"
	"strconv"
	"strings"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/filesystem/filesystemconnect"
	"github.com/wrenn/wrenn/api/proto/process/processconnect"
)

// envdPort is where the guest agent listens in every sandbox.
const envdPort = 49983

const (
	headerSandboxID   = "E2b-Sandbox-Id"
	headerSandboxPort = "E2b-Sandbox-Port"
	headerAccessToken = "X-Access-Token"

	headerTrafficToken = "E2b-Traffic-Access-Token"
)

// Sandbox is a running sandbox as seen through the data plane. It is safe for
// concurrent use.
type Sandbox struct {
	id         string
	token      string // for the guest agent
	baseURL    string
	named      bool // baseURL names sandbox and port
	http       *http.Client
	processes  processconnect.ProcessClient
	filesystem filesystemconnect.FilesystemClient

	trafficToken string // for the other ports, where they want one
}

// Sandbox returns a handle of the sandbox that info, from Create, Get or Connect,
// describes. It does not connect.
func (c *Client) Sandbox(info Info) *Sandbox {
	base := c.config.SandboxURL
	named := base == ""
	if named {
		domain := c.config.Domain
		if info.Domain != "" {
			domain = info.Domain
		}
		base = "https://" + strconv.Itoa(envdPort) + "-" + info.SandboxID + "." + domain
	}
	return &Sandbox{
		id:         info.SandboxID,
		token:      info.EnvdAccessToken,
		baseURL:    base,
		named:      named,
		http:       c.data,
		processes:  processconnect.NewProcessClient(c.data, base),
		filesystem: filesystemconnect.NewFilesystemClient(c.data, base),

		trafficToken: info.TrafficAccessToken,
	}
}

// ID returns the sandbox's id.
func (s *Sandbox) ID() string { return s.id }

// Processes returns the bare RPC client of the sandbox's processes. Its contexts
// come from Context.
func (s *Sandbox) Processes() processconnect.ProcessClient { return s.processes }

// Filesystem returns the bare RPC client of the sandbox's file system. Its
// contexts come from Context.
func (s *Sandbox) Filesystem() filesystemconnect.FilesystemClient { return s.filesystem }

// Context returns a context with which one RPC reaches this sandbox, acting as
// the given user (empty: the template's default). It is good for one call.
func (s *Sandbox) Context(ctx context.Context, user string) context.Context {
	ctx, call := connect.NewClientContext(ctx)
	s.address(call.RequestHeader(), user)
	return ctx
}

// address sets the headers that route a request to the sandbox and authorize it.
func (s *Sandbox) address(h http.Header, user string) {
	h.Set(headerSandboxID, s.id)
	h.Set(headerSandboxPort, strconv.Itoa(envdPort))
	h.Set("User-Agent", "wrenn-cli")
	if s.token != "" {
		h.Set(headerAccessToken, s.token)
	}
	if user != "" {
		h.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user+":")))
	}
}

// rpcMessage returns the remote's words of an RPC error, without the code.
func rpcMessage(err *connect.Error) string { return strings.TrimSpace(err.Message()) }
