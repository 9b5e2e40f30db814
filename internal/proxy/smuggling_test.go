package proxy_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// outcome is what a request that may be understood in several ways comes to. In no
// case does an application see a request that its client has not made.
type outcome struct {
	refused bool   // the client gets an error, the application nothing whole
	nowhere bool   // the request is for no application
	late    bool   // what is wrong shows after the request that arrives, or before
	arrives string // else the one request that the application gets, and nothing more
	next    bool   // and after it /smuggled, which is the client's own next request
}

var refused = outcome{refused: true}

func arrives(request string) outcome { return outcome{arrives: request} }

// judge holds what the witness saw against what was to happen. After each case
// another client makes a request, perhaps on the connection to the application that
// the case has left behind.
func (f *front) judge(t *testing.T, w *witness, want outcome, statuses []int) {
	t.Helper()
	host := fmt.Sprintf("%d-%s.wrenn.test", w.port, idA)
	after := f.send(t, "GET /after HTTP/1.1\r\nHost: "+host+"\r\nConnection: close\r\n\r\n", "")
	if len(after) != 1 || after[0].StatusCode != 200 {
		t.Errorf("the next client got %v", after)
	}
	seen := w.take()
	others := slices.DeleteFunc(slices.Clone(seen), func(s string) bool { return s == "GET /after " || s == "GET /last " })
	if n := count(seen, "GET /after "); n != 1 {
		t.Errorf("the next client's request came %d times: %q", n, seen)
	}
	if want.next {
		if !slices.Equal(others, []string{want.arrives, "GET /smuggled "}) {
			t.Errorf("the application saw %q, want %q and the client's next request", others, want.arrives)
		}
		return
	}
	if want.nowhere || want.late && len(others) == 0 {
		if len(others) > 0 {
			t.Errorf("the application saw %q", others)
		}
		return
	}
	if want.refused {
		// What is found out within the body comes when the header has gone on.
		if len(others) > 1 || len(others) == 1 && !strings.HasSuffix(others[0], "cut off") {
			t.Errorf("the application saw %q, want nothing whole", others)
		}
		for _, status := range statuses[:min(1, len(statuses))] {
			if status != 0 && status < 400 {
				t.Errorf("answered %d", status)
			}
		}
		return
	}
	if len(others) != 1 || others[0] != want.arrives {
		t.Errorf("the application saw %q, want %q alone; answered %v", others, want.arrives, statuses)
	}
}

func count(list []string, s string) (n int) {
	for _, item := range list {
		if item == s {
			n++
		}
	}
	return n
}

func TestNothingIsSmuggledOverHTTP1(t *testing.T) {
	f := newFront(t)
	w := newWitness(t)
	host := fmt.Sprintf("Host: %d-%s.wrenn.test\r\n", w.port, idA)
	smuggled := "GET /smuggled HTTP/1.1\r\n" + host + "\r\n"
	chunk := func(s string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(s), s) }
	chunked := chunk(smuggled) + "0\r\n\r\n"
	length := func(n int) string { return fmt.Sprintf("Content-Length: %d\r\n", n) }
	const te = "Transfer-Encoding: chunked\r\n"
	post := func(header, body string) string { return "POST /a HTTP/1.1\r\n" + host + header + "\r\n" + body }
	get := func(header string) string { return "GET /a HTTP/1.1\r\n" + host + header + "\r\n" }
	whole := arrives("POST /a " + smuggled)

	for name, tc := range map[string]struct {
		request string
		want    outcome
	}{
		// Length and chunked.
		"CL.TE":                           {post(length(4)+te, chunked), whole},
		"CL.TE, length first, body short": {post(length(len(chunked)+20)+te, "0\r\n\r\n"+smuggled), outcome{arrives: "POST /a ", next: true}},
		"TE.CL":                           {post(te+length(3), chunk("x"+smuggled)+"0\r\n\r\n"), arrives("POST /a x" + smuggled)},
		"TE.CL with nothing in it":        {post(te+length(len(smuggled)), "0\r\n\r\n"), arrives("POST /a ")},
		"GET with CL.TE":                  {get(length(4)+te) + chunked, arrives("GET /a " + smuggled)},

		// Transfer-Encoding in disguise.
		"two TE":                      {post(te+te, chunked), refused},
		"TE chunked and identity":     {post(te+"Transfer-Encoding: identity\r\n", chunked), refused},
		"TE identity and chunked":     {post("Transfer-Encoding: identity\r\n"+te, chunked), refused},
		"TE list, chunked last":       {post("Transfer-Encoding: gzip, chunked\r\n", chunked), refused},
		"TE list, chunked first":      {post("Transfer-Encoding: chunked, identity\r\n", chunked), refused},
		"TE xchunked":                 {post("Transfer-Encoding: xchunked\r\n"+length(0), chunked), refused},
		"TE in quotes":                {post("Transfer-Encoding: \"chunked\"\r\n"+length(0), chunked), refused},
		"TE with a parameter":         {post("Transfer-Encoding: chunked;q=1\r\n"+length(0), chunked), refused},
		"TE with a comma":             {post("Transfer-Encoding: ,chunked\r\n"+length(0), chunked), refused},
		"TE with a space before ':'":  {post("Transfer-Encoding : chunked\r\n"+length(0), chunked), refused},
		"TE with a tab before ':'":    {post("Transfer-Encoding\t: chunked\r\n"+length(0), chunked), refused},
		"TE with vertical tab":        {post("Transfer-Encoding:\x0bchunked\r\n"+length(0), chunked), refused},
		"TE with NUL":                 {post("Transfer-Encoding: chunked\x00\r\n"+length(0), chunked), refused},
		"TE with NUL in its name":     {post("Transfer-Enc\x00oding: chunked\r\n"+length(0), chunked), refused},
		"TE with a non-ASCII space":   {post("Transfer-Encoding: \xa0chunked\r\n"+length(0), chunked), refused},
		"TE with a bare CR":           {post("X: y\rTransfer-Encoding: chunked\r\n"+length(0), chunked), refused},
		"TE behind a space":           {post(" Transfer-Encoding: chunked\r\n"+length(0), chunked), refused},
		"TE folded":                   {post("Transfer-Encoding:\r\n chunked\r\n", chunked), whole},
		"TE hidden by Connection":     {post(te+"Connection: Transfer-Encoding\r\n", chunked), whole},
		"TE with spaces and a tab":    {post("Transfer-Encoding:  \t chunked \t\r\n", chunked), whole},
		"TE in capitals":              {post("TRANSFER-ENCODING: CHUNKED\r\n", chunked), whole},
		"TE of underscores":           {post("Transfer_Encoding: chunked\r\n"+length(0), ""), arrives("POST /a ")},
		"TE of underscores, and data": {post("Transfer_Encoding: chunked\r\nConnection: close\r\n"+length(0), chunked), arrives("POST /a ")},

		// Content-Length.
		"two lengths":                  {post(length(4)+length(0), "body"), refused},
		"two lengths, the same":        {post(length(4)+length(4), "body"), arrives("POST /a body")},
		"a list of lengths":            {post("Content-Length: 4, 0\r\n", "body"), refused},
		"a list of the same":           {post("Content-Length: 4, 4\r\n", "body"), refused},
		"length with a plus":           {post("Content-Length: +4\r\n", "body"), refused},
		"length with a minus":          {post("Content-Length: -4\r\n", "body"), refused},
		"length -0":                    {post("Content-Length: -0\r\n", ""), refused},
		"length with spaces":           {post("Content-Length: 4 4\r\n", "body"), refused},
		"length in hex":                {post("Content-Length: 0x4\r\n", "body"), refused},
		"length with an underscore":    {post("Content-Length: 1_0\r\n", "body"), refused},
		"length with a point":          {post("Content-Length: 4.0\r\n", "body"), refused},
		"length of no digits":          {post("Content-Length: \r\n", smuggled), refused},
		"length beyond 64 bits":        {post("Content-Length: 18446744073709551620\r\n", "body"), refused},
		"length with leading zeros":    {post("Content-Length: 0004\r\n", "body"), arrives("POST /a body")},
		"length of other digits":       {post("Content-Length: \xd9\xa4\r\n", "body"), refused},
		"length with a space before :": {post("Content-Length : 4\r\n", "body"), refused},
		"length hidden by Connection":  {post(length(4)+"Connection: Content-Length\r\n", "body"), arrives("POST /a body")},
		"no length at all":             {post("", smuggled), outcome{arrives: "POST /a ", next: true}},

		// Chunks.
		"chunk size that overflows":           {post(te, "10000000000000005\r\nhello\r\n0\r\n\r\n"+smuggled), refused},
		"chunk size that is negative":         {post(te, "-5\r\nhello\r\n0\r\n\r\n"+smuggled), refused},
		"chunk size with a plus":              {post(te, "+5\r\nhello\r\n0\r\n\r\n"+smuggled), refused},
		"chunk size with 0x":                  {post(te, "0x5\r\nhello\r\n0\r\n\r\n"+smuggled), refused},
		"chunk size with an underscore":       {post(te, "0_5\r\nhello\r\n0\r\n\r\n"+smuggled), refused},
		"chunk size of nothing":               {post(te, "\r\nhello\r\n0\r\n\r\n"+smuggled), refused},
		"chunk size before a space":           {post(te, "5 \r\nhello\r\n0\r\n\r\n"), arrives("POST /a hello")},
		"chunk with an extension":             {post(te, "5;a=b\r\nhello\r\n0;c=\"d\"\r\n\r\n"), arrives("POST /a hello")},
		"extension with a request":            {post(te, "5;a=\"GET /smuggled HTTP/1.1\"\r\nhello\r\n0\r\n\r\n"), arrives("POST /a hello")},
		"extension with a bare LF":            {post(te, "2;\nxx\r\n4c\r\n0\r\n\r\n"+smuggled), refused},
		"extension with a bare CR":            {post(te, "2;a\rxx\r\n0\r\n\r\n"+smuggled), refused},
		"chunk size ended by a bare LF":       {post(te, "5\nhello\r\n0\r\n\r\n"), refused},
		"chunk size ended by a bare CR":       {post(te, "5\rhello\r\n0\r\n\r\n"), refused},
		"chunk ended by a bare LF":            {post(te, "5\r\nhello\n0\r\n\r\n"), refused},
		"chunk ended by other bytes":          {post(te, "5\r\nhelloXX0\r\n\r\n"+smuggled), refused},
		"chunk longer than said":              {post(te, "5\r\nhello world\r\n0\r\n\r\n"+smuggled), refused},
		"trailer that looks like a request":   {post(te, "5\r\nhello\r\n0\r\nGET /smuggled HTTP/1.1\r\n"+host+"\r\n"), refused},
		"trailer with a length":               {post(te+"Trailer: Content-Length\r\n", "5\r\nhello\r\n0\r\nContent-Length: 50\r\n\r\n"), refused},
		"trailer that nobody announced":       {post(te, "5\r\nhello\r\n0\r\nX: y\r\n\r\n"), arrives("POST /a hello + trailer X: y")},
		"trailers that are not for there":     {post(te, "5\r\nhello\r\n0\r\nTransfer-Encoding: x\r\nX-Forwarded-For: y\r\n\r\n"), arrives("POST /a hello")},
		"a request behind the last chunk":     {post(te+"Connection: close\r\n", "5\r\nhello\r\n0\r\n\r\n"+smuggled), arrives("POST /a hello")},
		"trailer with a colon in its name":    {post(te+"Trailer: X: y\r\n", "5\r\nhello\r\n0\r\n\r\n"), arrives("POST /a hello")},
		"announced trailer with a line in it": {post(te+"Trailer: A\r\n", "5\r\nhello\r\n0\r\nA: b\rGET /smuggled HTTP/1.1\r\n\r\n"), refused},

		// Lines.
		"bare CR in a header":               {get("X: a\rContent-Length: 5\r\n"), refused},
		"bare CR in the target":             {"GET /a\rX HTTP/1.1\r\n" + host + "\r\n", refused},
		"bare CR ends the request line":     {"GET /a HTTP/1.1\rX: y\r\n" + host + "\r\n", refused},
		"bare LF ends the lines":            {strings.ReplaceAll(get(""), "\r\n", "\n"), arrives("GET /a ")},
		"bare LF ends the header":           {"GET /a HTTP/1.1\r\n" + host + "X: y\n\n", arrives("GET /a ")},
		"CR CR LF":                          {get("X: y\r\r\n"), refused},
		"a folded line":                     {get("Fold: a\r\n b\r\n"), arrives("GET /a ")},
		"a folded length":                   {post("Content-Length:\r\n 4\r\n", "body"), arrives("POST /a body")},
		"a folded first line":               {"GET /a HTTP/1.1\r\n " + host + "\r\n", refused},
		"a header without a colon":          {get("nonsense\r\n"), refused},
		"a header without a name":           {get(": x\r\n"), refused},
		"a name with a space":               {get("X Y: z\r\n"), refused},
		"a name with a slash":               {get("X/Y: z\r\n"), refused},
		"NUL in a value":                    {get("X: a\x00b\r\n"), refused},
		"NUL in the target":                 {"GET /a\x00b HTTP/1.1\r\n" + host + "\r\n", refused},
		"a control character in a value":    {get("X: a\x08b\r\n"), refused},
		"spaces in the target":              {"GET /a b HTTP/1.1\r\n" + host + "\r\n", refused},
		"a request as the target":           {"GET /a HTTP/1.1\r\nX: y HTTP/1.1\r\n" + host + "\r\n", arrives("GET /a ")},
		"a tab in the request line":         {"GET\t/a\tHTTP/1.1\r\n" + host + "\r\n", refused},
		"two spaces in the request line":    {"GET  /a HTTP/1.1\r\n" + host + "\r\n", refused},
		"space before the request line":     {" GET /a HTTP/1.1\r\n" + host + "\r\n", refused},
		"empty lines before the request":    {"\r\n\r\nGET /a HTTP/1.1\r\n" + host + "\r\n", refused},
		"a method in parts":                 {"GE(T /a HTTP/1.1\r\n" + host + "\r\n", refused},
		"HTTP/0.9":                          {"GET /a\r\n" + host + "\r\n", refused},
		"HTTP/1.2":                          {"GET /a HTTP/1.2\r\n" + host + "\r\n", arrives("GET /a ")},
		"HTTP/2 as text":                    {"GET /a HTTP/2.0\r\n" + host + "\r\n", refused},
		"HTTP/11":                           {"GET /a HTTP/11.1\r\n" + host + "\r\n", refused},
		"HTTP/1.0, chunked":                 {"POST /a HTTP/1.0\r\n" + host + "Connection: keep-alive\r\n" + te + "\r\n" + smuggled, arrives("POST /a ")},
		"HTTP/1.0, chunked with a length":   {"POST /a HTTP/1.0\r\n" + host + "Connection: keep-alive\r\n" + te + length(4) + "\r\nbody" + smuggled, arrives("POST /a body")},
		"a handshake that fails":            {get("Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 1\r\n"), arrives("GET /a ")},
		"an upgrade with a body":            {post("Connection: Upgrade\r\nUpgrade: websocket\r\n"+length(len(smuggled)), smuggled), whole},
		"expectation of something else":     {post("Expect: 200-ok\r\n"+length(4), "body"), refused},
		"a body that waits to be asked for": {post("Expect: 100-continue\r\n"+length(len(smuggled)), smuggled), whole},
		"body cut off":                      {post(length(100)+"Connection: close\r\n", smuggled), refused},
		"chunks cut off":                    {post(te, chunk(smuggled)), refused},
	} {
		t.Run(name, func(t *testing.T) {
			var statuses []int
			last := "GET /last HTTP/1.1\r\n" + host + "Connection: close\r\n\r\n"
			for _, res := range f.send(t, tc.request, last) {
				statuses = append(statuses, res.StatusCode)
			}
			f.judge(t, w, tc.want, statuses)
		})
	}
}

func TestNothingIsSmuggledFromHTTP2IntoHTTP1(t *testing.T) {
	f := newFront(t)
	w := newWitness(t)
	host := fmt.Sprintf("%d-%s.wrenn.test", w.port, idA)
	smuggled := "GET /smuggled HTTP/1.1\r\nHost: " + host + "\r\n\r\n"
	request := func(method string, more ...field) []field {
		return append([]field{{":method", method}, {":scheme", "http"}, {":authority", host}, {":path", "/a"}}, more...)
	}
	with := func(pseudo, value string) []field {
		fields := request(http.MethodGet)
		for i := range fields {
			if fields[i].name == pseudo {
				fields[i].value = value
			}
		}
		return fields
	}
	length := func(n int) field { return field{"content-length", fmt.Sprint(n)} }
	for name, tc := range map[string]struct {
		fields []field
		body   []string
		want   outcome
	}{
		"nothing special":           {request("POST"), []string{smuggled}, arrives("POST /a " + smuggled)},
		"a length that is right":    {request("POST", length(4)), []string{"bo", "dy"}, arrives("POST /a body")},
		"a length that is short":    {request("POST", length(4)), []string{"body" + smuggled}, refused},
		"a length that is long":     {request("POST", length(100)), []string{smuggled}, refused},
		"a length of 0 and a body":  {request("POST", length(0)), []string{smuggled}, outcome{arrives: "POST /a ", late: true}},
		"a length and no body":      {request("POST", length(len(smuggled))), nil, refused},
		"two lengths":               {request("POST", length(4), length(len(smuggled))), []string{smuggled}, refused},
		"a length with a plus":      {request("POST", field{"content-length", "+4"}), []string{"body"}, refused},
		"a list of lengths":         {request("POST", field{"content-length", "4, 4"}), []string{"body"}, refused},
		"a length that is no digit": {request("POST", field{"content-length", "x"}), []string{"body"}, refused},
		"transfer-encoding":         {request("POST", field{"transfer-encoding", "chunked"}), []string{"0\r\n\r\n" + smuggled}, refused},
		"connection":                {request("GET", field{"connection", "close"}), nil, refused},
		"keep-alive":                {request("GET", field{"keep-alive", "timeout=5"}), nil, refused},
		"proxy-connection":          {request("GET", field{"proxy-connection", "close"}), nil, refused},
		"upgrade":                   {request("GET", field{"upgrade", "h2c"}), nil, refused},
		"te of gzip":                {request("GET", field{"te", "gzip"}), nil, refused},
		"te of trailers":            {request("GET", field{"te", "trailers"}), nil, arrives("GET /a ")},
		"a line in a value":         {request("GET", field{"x", "y\r\nTransfer-Encoding: chunked"}), nil, refused},
		"LF in a value":             {request("GET", field{"x", "y\nz: w"}), nil, refused},
		"CR in a value":             {request("GET", field{"x", "y\rz: w"}), nil, refused},
		"NUL in a value":            {request("GET", field{"x", "y\x00"}), nil, refused},
		"space around a value":      {request("GET", field{"x", " y "}), nil, arrives("GET /a ")},
		"a line in a name":          {request("GET", field{"x: y\r\nz", "w"}), nil, refused},
		"a colon in a name":         {request("GET", field{"transfer-encoding: chunked", "x"}), nil, refused},
		"a space in a name":         {request("GET", field{"x y", "z"}), nil, refused},
		"a name in capitals":        {request("GET", field{"Transfer-Encoding", "chunked"}), nil, refused},
		"an empty name":             {request("GET", field{"", "x"}), nil, refused},
		"an unknown pseudo header":  {request("GET", field{":x", "y"}), nil, refused},
		"a late pseudo header":      {append([]field{{"x", "y"}}, request("GET")...), nil, refused},
		"two paths":                 {append(request("GET"), field{":path", "/smuggled"}), nil, refused},
		"a request as the method":   {with(":method", "GET /smuggled HTTP/1.1\r\nHost: "+host+"\r\n\r\nGET"), nil, refused},
		"spaces in the method":      {with(":method", "GET /smuggled HTTP/1.1"), nil, refused},
		"an empty method":           {with(":method", ""), nil, refused},
		"a method that is no word":  {with(":method", "g,t"), nil, refused},
		"a request in the path":     {with(":path", "/a HTTP/1.1\r\nHost: "+host+"\r\n\r\nGET /smuggled"), nil, refused},
		"a space in the path":       {with(":path", "/a HTTP/1.1"), nil, refused},
		"a tab in the path":         {with(":path", "/a\tb"), nil, refused},
		"a path without a slash":    {with(":path", "a"), nil, refused},
		"a URL for the path":        {with(":path", "http://"+host+"/a"), nil, refused},
		"an empty path":             {with(":path", ""), nil, refused},
		"a star for the path":       {with(":path", "*"), nil, refused},
		"a line in the authority":   {with(":authority", host+"\r\nX: y"), nil, refused},
		"a space in the authority":  {with(":authority", host+" x"), nil, outcome{nowhere: true}},
		"a line in the scheme":      {with(":scheme", "http://x/ HTTP/1.1\r\nx: y"), nil, refused},
		"a trailer named a length":  {request("POST", field{"trailer", "content-length"}), []string{"body"}, arrives("POST /a body")},
		"CONNECT to the agent":      {[]field{{":method", "CONNECT"}, {":authority", "49983-" + idA + ".wrenn.test"}}, []string{smuggled}, refused},
	} {
		t.Run(name, func(t *testing.T) {
			status := f.send2(t, tc.fields, tc.body...)
			f.judge(t, w, tc.want, []int{status})
		})
	}
}
