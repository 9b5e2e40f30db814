package proxy_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/proxy"
)

// report is an application that shows who it takes the client for.
func report(rw http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(rw, "host=%s", r.Host)
	names := make([]string, 0, len(r.Header))
	for name := range r.Header {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		switch name {
		case "User-Agent", "Accept-Encoding", "Content-Length":
		default:
			fmt.Fprintf(rw, " %s=%s", name, strings.Join(r.Header[name], "|"))
		}
	}
}

// one sends a request over HTTP/1.1 and returns the first answer's status and body.
func (f *front) one(t *testing.T, request string) (int, string) {
	t.Helper()
	answers := f.send(t, request, "")
	if len(answers) == 0 {
		return 0, ""
	}
	body, _ := io.ReadAll(answers[0].Body)
	return answers[0].StatusCode, string(body)
}

func TestTheHostThatRoutesIsTheHostThatTheApplicationSees(t *testing.T) {
	f := newFront(t)
	port := guest(t, report)
	name := fmt.Sprintf("%d-%s.wrenn.test", port, idA)
	other := fmt.Sprintf("%d-%s.wrenn.test", port, idB)
	get := func(target string, hosts ...string) string {
		request := "GET " + target + " HTTP/1.1\r\n"
		for _, host := range hosts {
			request += "Host: " + host + "\r\n"
		}
		return request + "Connection: close\r\n\r\n"
	}
	for what, tc := range map[string]struct {
		request string
		status  int
		host    string // of what the application sees; empty: it sees nothing
	}{
		"a name":                      {get("/", name), 200, name},
		"a name in capitals":          {get("/", strings.ToUpper(name)), 200, strings.ToUpper(name)},
		"a name with a port":          {get("/", name+":8443"), 200, name + ":8443"},
		"a name with the root's dot":  {get("/", name+"."), 200, name + "."},
		"two hosts":                   {get("/", name, other), 400, ""},
		"two hosts, the same":         {get("/", name, name), 400, ""},
		"no host":                     {get("/"), 400, ""},
		"a list of hosts":             {get("/", name+", "+other), 400, ""},
		"user information":            {get("/", "user@"+name), 400, ""},
		"user and password":           {get("/", "a:b@"+name), 400, ""},
		"a port in words":             {get("/", name+":http"), 400, ""},
		"two ports":                   {get("/", name+":1:2"), 400, ""},
		"too long a port":             {get("/", name+":123456"), 400, ""},
		"a shell in the port":         {get("/", name+":$(id)"), 400, ""},
		"a path in the host":          {get("/", name+"/x"), 400, ""},
		"a query in the host":         {get("/", name+"?x"), 400, ""},
		"a space in the host":         {get("/", name+" x"), 400, ""},
		"a quote in the host":         {get("/", name+`"`), 400, ""},
		"an escape in the host":       {get("/", "%33"+name[1:]), 400, ""},
		"a fold in the host":          {"GET / HTTP/1.1\r\nHost: " + name + "\r\n .evil\r\nConnection: close\r\n\r\n", 400, ""},
		"a host with a suffix":        {get("/", name+".evil.test"), 404, ""},
		"a host with a prefix":        {get("/", "x."+name), 400, ""},
		"an absolute target":          {get("http://"+name+"/", name), 200, name},
		"another absolute target":     {get("http://"+name+"/", "api.wrenn.test"), 200, name},
		"the API's absolute target":   {get("http://api.wrenn.test/", name), 404, ""},
		"a target with a user":        {get("http://me:secret@"+name+"/", name), 200, name},
		"a target with brackets":      {get("http://"+name+":80<script>/", name), 400, ""},
		"a target of another scheme":  {get("ftp://"+name+"/", "api.wrenn.test"), 200, name},
		"a target that is a host":     {get("//"+other+"/", name), 200, name},
		"a target without a path":     {get("http://"+name, "api.wrenn.test"), 200, name},
		"routing headers by the name": {get("/", name+"\r\nE2b-Sandbox-Id: "+idB+"\r\nE2b-Sandbox-Port: 1"), 200, name},
	} {
		status, body := f.one(t, tc.request)
		host := ""
		if rest, ok := strings.CutPrefix(body, "host="); ok {
			host, _, _ = strings.Cut(rest, " ")
		}
		if tc.status == 404 && strings.HasPrefix(body, "api ") {
			status = 404 // to the API, which is not here
		}
		if status != tc.status || host != tc.host {
			t.Errorf("%s: %d, the application saw %q, want %d %q (%s)", what, status, host, tc.status, tc.host, body)
		}
	}
}

func TestTheAuthorityGoesBeforeTheHostInHTTP2(t *testing.T) {
	f := newFront(t)
	w := newWitness(t)
	name := fmt.Sprintf("%d-%s.wrenn.test", w.port, idA)
	request := func(more ...field) []field {
		return append([]field{{":method", "GET"}, {":scheme", "https"}, {":path", "/"}}, more...)
	}
	for what, tc := range map[string]struct {
		fields []field
		taken  bool
	}{
		"the authority alone":      {request(field{":authority", name}), true},
		"a host alone":             {request(field{"host", name}), true},
		"both, the same":           {request(field{":authority", name}, field{"host", name}), true},
		"both, another host":       {request(field{":authority", name}, field{"host", "api.wrenn.test"}), true},
		"a host of another one":    {request(field{":authority", "api.wrenn.test"}, field{"host", name}), false},
		"two authorities":          {request(field{":authority", name}, field{":authority", name}), false},
		"two hosts":                {request(field{"host", name}, field{"host", "api.wrenn.test"}), true},
		"user information":         {request(field{":authority", "me@" + name}), false},
		"an authority with a path": {request(field{":authority", name + "/x"}), false},
		"none":                     {request(), false},
	} {
		f.send2(t, tc.fields)
		seen := w.raw()
		switch {
		case !tc.taken && seen != "":
			t.Errorf("%s: the application saw %q", what, seen)
		case tc.taken && (strings.Count(strings.ToLower(seen), "\r\nhost: ") != 1 || !strings.Contains(seen, "\r\nHost: "+name+"\r\n")):
			t.Errorf("%s: the application saw %q", what, seen)
		}
	}
}

// raw returns the bytes that came since the last time.
func (w *witness) raw() (all string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, conn := range w.conns {
		all += conn.String()
		conn.Reset()
	}
	return all
}

func TestNobodySpeaksForTheProxy(t *testing.T) {
	f := newFront(t)
	f.rule(idA, proxy.Access{Protected: true, Token: token, LinkKey: linkKey})
	port := guest(t, report)
	name := fmt.Sprintf("%d-%s.wrenn.test", port, idA)
	const true1 = " X-Forwarded-For=127.0.0.1 X-Forwarded-Host=NAME X-Forwarded-Proto=http"
	for what, tc := range map[string]struct{ header, sees string }{
		"nothing":                   {"", true1},
		"where it comes from":       {"X-Forwarded-For: 10.0.0.1\r\nX-Real-IP: 10.0.0.1\r\nForwarded: for=10.0.0.1;host=evil;proto=https\r\n", true1},
		"how it came":               {"X-Forwarded-Host: evil\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Port: 1\r\nX-Forwarded-Server: x\r\n", true1},
		"what nobody has heard of":  {"X-Forwarded-Ssl: on\r\nX-Forwarded-Scheme: https\r\nX-Forwarded-Prefix: /x\r\nX-Forwarded-User: root\r\n", true1},
		"another target":            {"X-Original-URL: /admin\r\nX-Rewrite-URL: /admin\r\nX-Original-Host: x\r\nX-HTTP-Host-Override: x\r\n", true1},
		"in underscores":            {"X_Forwarded_For: 10.0.0.1\r\nX_Real_IP: 10.0.0.1\r\nx_original_url: /admin\r\nX-Forwarded_Host: evil\r\n", true1},
		"in small letters":          {"x-forwarded-for: 10.0.0.1\r\nforwarded: for=x\r\n", true1},
		"twice":                     {"X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-For: 10.0.0.2\r\n", true1},
		"away by Connection":        {"Connection: X-Forwarded-For, X-Forwarded-Host, X-Forwarded-Proto, Host, close\r\n", true1},
		"hop by hop":                {"Keep-Alive: x\r\nProxy-Authorization: x\r\nProxy-Connection: x\r\nTE: gzip\r\nConnection: X-Mine\r\nX-Mine: x\r\n", true1},
		"what is its own":           {"X-Mine: x\r\nX-Forwarded: x\r\nVia: 1.1 x\r\n", " Via=1.1 x X-Forwarded=x" + true1 + " X-Mine=x"},
		"the token away":            {"Connection: e2b-traffic-access-token, close\r\n", true1},
		"the token away, keep it":   {"Connection: keep-alive, E2B-TRAFFIC-ACCESS-TOKEN\r\n", true1},
		"a cookie beside a preview": {"Cookie: a=b; wrenn_preview_80=x\r\n", " Cookie=a=b" + true1},
	} {
		request := "GET / HTTP/1.1\r\nHost: " + name + "\r\ne2b-traffic-access-token: " + token + "\r\n" + tc.header
		if !strings.Contains(tc.header, "Connection: ") {
			request += "Connection: close\r\n"
		}
		status, body := f.one(t, request+"\r\n")
		if want := "host=" + name + strings.ReplaceAll(tc.sees, "NAME", name); status != 200 || body != want {
			t.Errorf("%s: %d, the application saw\n%s, want\n%s", what, status, body, want)
		}
	}
	// Declaring the token to be between two neighbours is not to have it.
	if status, body := f.one(t, "GET / HTTP/1.1\r\nHost: "+name+"\r\nConnection: e2b-traffic-access-token, close\r\n\r\n"); status != 403 {
		t.Errorf("without a token: %d %s", status, body)
	}
}

func TestNeitherTLSNamesNorConnectionsLetIn(t *testing.T) {
	f := newFront(t)
	f.rule(idA, proxy.Access{Protected: true, Token: "token of A"})
	f.rule(idB, proxy.Access{Protected: true, Token: "token of B"})
	port := guest(t, func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "A") })
	guestAt(t, fmt.Sprintf("127.0.0.2:%d", port), func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "B") })
	nameOf := func(id string) string { return fmt.Sprintf("%d-%s.wrenn.test", port, id) }
	for _, version := range []string{"HTTP/1.1", "HTTP/2.0"} {
		dialed := 0
		var protocols http.Protocols
		protocols.SetHTTP1(version == "HTTP/1.1")
		protocols.SetHTTP2(version == "HTTP/2.0")
		transport := &http.Transport{
			Protocols: &protocols, TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				dialed++
				return (&net.Dialer{}).DialContext(ctx, network, f.tls)
			},
		}
		defer transport.CloseIdleConnections()
		client := &http.Client{Transport: transport, Timeout: 10 * time.Second}
		for _, tc := range []struct {
			host, token string
			want        string // empty: 403
		}{
			{idA, "token of A", "A"}, {idB, "token of B", "B"}, {idB, "token of A", ""}, {idA, "token of B", ""},
			{idB, "", ""}, {idA, "", ""}, {idA, "token of A", "A"},
		} {
			// The connection is opened with the name of A whatever the host is.
			req, err := http.NewRequestWithContext(t.Context(), "GET", "https://"+nameOf(idA)+"/", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Host = nameOf(tc.host)
			if tc.token != "" {
				req.Header.Set(proxy.HeaderTrafficToken, tc.token)
			}
			res, body := do(t, client, req)
			if res.Proto != version || (tc.want != "" && body != tc.want) || (tc.want == "" && res.StatusCode != 403) {
				t.Errorf("%s, host of %s with %q: %s %s", res.Proto, tc.host[:1], tc.token, res.Status, body)
			}
		}
		if dialed != 1 {
			t.Errorf("%s: %d connections, want one for all", version, dialed)
		}
	}
}

func TestOnlyWhatIsSafeIsSwitchedTo(t *testing.T) {
	f := newFront(t)
	port := guest(t, report)
	guestAt(t, fmt.Sprintf("127.0.0.2:%d", proxy.AgentPort), report)
	const upgraded = "Connection=Upgrade Upgrade="
	for what, tc := range map[string]struct{ header, sees string }{
		"WebSocket":              {"Connection: Upgrade\r\nUpgrade: websocket\r\n", upgraded + "websocket"},
		"WebSocket, other words": {"Connection: keep-alive, UPGRADE\r\nUpgrade: WebSocket\r\n", upgraded + "WebSocket"},
		"h2c":                    {"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n", ""},
		"H2C":                    {"Connection: upgrade\r\nUpgrade: H2C\r\n", ""},
		"HTTP/2.0":               {"Connection: upgrade\r\nUpgrade: HTTP/2.0\r\n", ""},
		"TLS":                    {"Connection: upgrade\r\nUpgrade: TLS/1.0, HTTP/1.1\r\n", ""},
		"a list":                 {"Connection: upgrade\r\nUpgrade: websocket, h2c\r\n", ""},
		"two lines":              {"Connection: upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n", ""},
		"without Connection":     {"Upgrade: websocket\r\n", ""},
		"empty":                  {"Connection: upgrade\r\nUpgrade: \r\n", ""},
		"over HTTP/1.0":          {"Connection: upgrade\r\nUpgrade: websocket\r\nVersion: 1.0\r\n", ""},
	} {
		for _, to := range []string{fmt.Sprintf("%d-%s", port, idA), fmt.Sprintf("%d-%s", proxy.AgentPort, idB)} {
			version := "1.1"
			if strings.Contains(tc.header, "Version: 1.0") {
				version = "1.0"
			}
			want := tc.sees
			if strings.HasSuffix(to, idB) {
				want = "" // the guest agent switches to nothing
			}
			status, body := f.one(t, "GET / HTTP/"+version+"\r\nHost: "+to+".wrenn.test\r\n"+tc.header+"\r\n")
			if status != 200 || (want != "") != strings.Contains(body, "Upgrade=") || !strings.Contains(body, want) {
				t.Errorf("%s to %s: %d, the application saw %q, want %q", what, to, status, body, want)
			}
		}
	}
}

func TestASwitchThatNobodyAskedForOpensNoTunnel(t *testing.T) {
	f := newFront(t)
	const answer = "HTTP/1.1 101 Switching Protocols\r\n"
	for what, tc := range map[string]struct{ request, answer string }{
		"not asked":                  {"GET / HTTP/1.1\r\nHOST\r\n", answer + "Connection: upgrade\r\nUpgrade: websocket\r\n\r\n"},
		"not asked, bare":            {"GET / HTTP/1.1\r\nHOST\r\n", answer + "\r\n"},
		"not asked, body awaited":    {"POST / HTTP/1.1\r\nHOSTExpect: 100-continue\r\nContent-Length: 4\r\n\r\n", answer + "\r\n"},
		"body awaited, with a name":  {"POST / HTTP/1.1\r\nHOSTExpect: 100-continue\r\nContent-Length: 4\r\n\r\n", answer + "Connection: upgrade\r\nUpgrade: x\r\n\r\n"},
		"h2c was asked":              {"GET / HTTP/1.1\r\nHOSTConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", answer + "Connection: upgrade\r\nUpgrade: h2c\r\n\r\n"},
		"another one was asked":      {"GET / HTTP/1.1\r\nHOSTConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", answer + "Connection: upgrade\r\nUpgrade: h2c\r\n\r\n"},
		"asked, no name in return":   {"GET / HTTP/1.1\r\nHOSTConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", answer + "\r\n"},
		"asked without a Connection": {"GET / HTTP/1.1\r\nHOSTUpgrade: websocket\r\n\r\n", answer + "Connection: upgrade\r\nUpgrade: websocket\r\n\r\n"},
	} {
		t.Run(what, func(t *testing.T) {
			through := make(chan string, 1)
			port := rawGuest(t, func(conn net.Conn) {
				br := bufio.NewReader(conn)
				if _, err := http.ReadRequest(br); err != nil {
					return
				}
				io.WriteString(conn, tc.answer)
				_ = conn.SetReadDeadline(time.Now().Add(patience))
				line, _ := br.ReadString('\n')
				through <- line
			})
			host := fmt.Sprintf("Host: %d-%s.wrenn.test\r\n", port, idA)
			conn, err := net.Dial("tcp", f.plain)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(2 * patience))
			request := strings.Replace(tc.request, "HOST", host, 1)
			if !strings.HasSuffix(request, "\r\n\r\n") {
				request += "\r\n"
			}
			io.WriteString(conn, request)
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if res.StatusCode != http.StatusBadGateway {
				t.Errorf("answered %s", res.Status)
			}
			io.WriteString(conn, "through the tunnel\n")
			if line := receive(t, through); strings.Contains(line, "tunnel") {
				t.Errorf("%q went through", line)
			}
		})
	}
}

// rawGuest starts a guest in sandbox A that deals with each connection by itself.
func rawGuest(t *testing.T, serve func(net.Conn)) uint16 {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			serve(conn)
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		ln.Close()
		<-done
	})
	return uint16(ln.Addr().(*net.TCPAddr).Port)
}

func TestNoWayLeadsToTheAgentsInternalRoutes(t *testing.T) {
	f := newFront(t)
	var requests received
	guestAt(t, fmt.Sprintf("127.0.0.2:%d", proxy.AgentPort), func(_ http.ResponseWriter, r *http.Request) { requests.add(r.RequestURI) })
	name := fmt.Sprintf("%d-%s.wrenn.test", proxy.AgentPort, idB)
	path := fmt.Sprintf("/proxy/%s/%d", idB, proxy.AgentPort)
	headers := fmt.Sprintf("\r\nE2b-Sandbox-Id: %s\r\nE2b-Sandbox-Port: %d", idB, proxy.AgentPort)
	send := func(target, host, more string) int {
		status, _ := f.one(t, "POST "+target+" HTTP/1.1\r\nHost: "+host+more+"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		return status
	}
	for _, target := range []string{
		"/init", "//init", "/INIT", "/%69nit", "/%2569nit", "/.//./init", "/x/../init", "/x%2f..%2finit", "/x%252f..%252finit", "/files/..%2Finit",
		"/files/..%5cinit", `/x\..\init`, "/init/.", "/init/../init", "/init%2f", "/init%09", "/init%0d%0a", "/init;a=b/x", "/./%2e/init", "/%2e%2e/init",
		"/init?wrenn_preview=x", "/poweroff", "/PowerOff/", "/logs", "/upgrade%20",
	} {
		ways := map[string]func() int{
			"by host":            func() int { return send(target, name, "") },
			"by absolute target": func() int { return send("http://"+name+target, "localhost", "") },
			"by path":            func() int { return send(path+target, "localhost", "") },
			"by headers":         func() int { return send(target, "localhost", headers) },
			"by headers and the shared host": func() int {
				return send(target, "sandbox.wrenn.test", headers)
			},
			"over HTTP/2": func() int {
				return f.send2(t, []field{{":method", "POST"}, {":scheme", "http"}, {":authority", name}, {":path", target}})
			},
			"over HTTP/2, by path": func() int {
				return f.send2(t, []field{{":method", "POST"}, {":scheme", "http"}, {":authority", "localhost"}, {":path", path + target}})
			},
		}
		for way, ask := range ways {
			status := ask()
			if seen := requests.take(); status != 404 || len(seen) > 0 {
				t.Errorf("%s %s: %d, the agent saw %q", target, way, status, seen)
			}
		}
	}
}

func TestWebSocketsOverHTTP2AreJudgedLikeTheOthers(t *testing.T) {
	f := newFront(t)
	f.rule(idA, protected)
	w := newWitness(t)
	var requests received
	guestAt(t, fmt.Sprintf("127.0.0.2:%d", proxy.AgentPort), func(_ http.ResponseWriter, r *http.Request) { requests.add(r.Method + " " + r.RequestURI) })
	connect := func(host, path, protocol string, more ...field) int {
		return f.send2(t, append([]field{
			{":method", "CONNECT"}, {":protocol", protocol}, {":scheme", "http"}, {":authority", host + ".wrenn.test"}, {":path", path},
			{"sec-websocket-version", "13"},
		}, more...))
	}
	app, agent := fmt.Sprintf("%d-%s", w.port, idA), fmt.Sprintf("%d-%s", proxy.AgentPort, idB)
	for what, tc := range map[string]struct {
		ask    func() int
		status int
	}{
		"without a token":         {func() int { return connect(app, "/", "websocket") }, 403},
		"with a wrong token":      {func() int { return connect(app, "/", "websocket", field{"e2b-traffic-access-token", "x"}) }, 403},
		"to h2c":                  {func() int { return connect(app, "/", "h2c", field{"e2b-traffic-access-token", token}) }, 405},
		"to the guest agent":      {func() int { return connect(agent, "/", "websocket") }, 405},
		"to an internal route":    {func() int { return connect(agent, "/init", "websocket") }, 405},
		"with two authorities":    {func() int { return connect(app, "/", "websocket", field{":authority", app}) }, 0},
		"without a path to speak": {func() int { return connect(app, "x", "websocket") }, 0},
	} {
		status := tc.ask()
		if tc.status != 0 && status != tc.status || status/100 == 2 {
			t.Errorf("%s: answered %d, want %d", what, status, tc.status)
		}
		if seen := w.raw(); seen != "" {
			t.Errorf("%s: the application saw %q", what, seen)
		}
		if seen := requests.take(); len(seen) > 0 {
			t.Errorf("%s: the agent saw %q", what, seen)
		}
	}
	connect(app, "/x?wrenn_preview="+linkTo(w.port, time.Hour), "websocket", field{"cookie", "wrenn_preview_1=x"})
	if seen := w.raw(); !strings.HasPrefix(seen, "GET /x HTTP/1.1\r\n") || strings.Contains(seen, "preview") || strings.Count(seen, "\r\nUpgrade: websocket\r\n") != 1 {
		t.Errorf("with a link the application saw %q", seen)
	}
}
