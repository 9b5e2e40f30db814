package e2b_test

import (
	"crypto/sha256"
	"net"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/server/e2b"
	"github.com/wrenn/wrenn/internal/store"
)

func hash(apiKey string) [32]byte   { return sha256.Sum256([]byte(apiKey)) }
func idOf(id string) sandbox.ID     { return sandbox.ID(id) }
func nested(depth int) string       { return strings.Repeat("[", depth) + strings.Repeat("]", depth) }
func field(name, v string) string   { return `{"templateID":"base","` + name + `":` + v + `}` }
func quoted(n int, s string) string { return `"` + strings.Repeat(s, n) + `"` }

func TestBadInputIsRefusedInTheClientsShape(t *testing.T) {
	r := newRig(t)
	id := r.create(map[string]any{})["sandboxID"].(string)
	const unknown = "aaaaaaaaaaaaaaaaaaaa"
	create, box := "POST /v2/sandboxes", "/sandboxes/"+id
	for _, c := range []struct {
		name, operation, body string
		status                int
		says                  string
	}{
		{"no body", create, "", 400, "missing"},
		{"white space", create, " \n", 400, "missing"},
		{"not JSON", create, "templateID=base", 400, "JSON"},
		{"cut off", create, `{"templateID":"base"`, 400, "JSON"},
		{"more than one value", create, `{"templateID":"base"}{}`, 400, "JSON"},
		{"null", create, "null", 400, "templateID"},
		{"an array", create, `["base"]`, 400, "an object"},
		{"a string", create, `"base"`, 400, "an object"},
		{"nested too deep", create, nested(20000), 400, ""},
		{"no template", create, `{}`, 400, "templateID"},
		{"an empty template", create, `{"templateID":""}`, 400, "templateID"},
		{"a number for a template", create, `{"templateID":5}`, 400, "templateID: want a string"},
		{"an unknown template", create, `{"templateID":"nope"}`, 404, `template "nope" not found`},
		{"a template with a path", create, `{"templateID":"../../etc/passwd"}`, 404, "not found"},
		{"a template with NUL", create, `{"templateID":"base\u0000"}`, 404, "not found"},
		{"a template of another owner", create, `{"templateID":"secret"}`, 403, ""},
		{"no time", create, field("timeout", "0"), 400, "greater than 0"},
		{"a negative time", create, field("timeout", "-1"), 400, "greater than 0"},
		{"the most negative time", create, field("timeout", "-9223372036854775808"), 400, ""},
		{"more than a day", create, field("timeout", "86401"), 400, "at most 86400"},
		{"a time that overflows nanoseconds", create, field("timeout", "9223372036854775807"), 400, "at most"},
		{"a time that wraps to a good one", create, field("timeout", "18446744074"), 400, "at most"},
		{"a time beyond 64 bits", create, field("timeout", "1e400"), 400, "timeout"},
		{"a fraction", create, field("timeout", "1.5"), 400, "timeout: want an integer"},
		{"a time in words", create, field("timeout", `"60"`), 400, "timeout: want an integer"},
		{"metadata that is a list", create, field("metadata", `["a"]`), 400, "metadata: want an object"},
		{"metadata with a number", create, field("metadata", `{"a":1}`), 400, "want a string"},
		{"too much metadata", create, field("metadata", `{"a":`+quoted(70000, "x")+`}`), 400, "metadata"},
		{"metadata with NUL", create, field("metadata", `{"a":"\u0000"}`), 400, "NUL"},
		{"a variable without a name", create, field("envVars", `{"":"x"}`), 400, "envVars"},
		{"a variable with =", create, field("envVars", `{"A=B":"x"}`), 400, "envVars"},
		{"a variable with NUL in its name", create, field("envVars", `{"A\u0000":"x"}`), 400, "envVars"},
		{"a variable with NUL in its value", create, field("envVars", `{"A":"\u0000"}`), 400, "NUL"},
		{"a variable that no program could be given", create, field("envVars", `{"A":`+quoted(128<<10-2, "x")+`}`), 400, "longer than 131070 bytes"},
		{"a variable that is a list", create, field("envVars", `{"A":[]}`), 400, "want a string"},
		{"internet of a wrong type", create, field("allow_internet_access", `"no"`), 400, "allow_internet_access: want a boolean"},
		{"a network of a wrong type", create, field("network", `[]`), 400, "network"},
		{"too large a body", create, field("metadata", `{"a":`+quoted(2<<20, "x")+`}`), 413, "larger than"},
		{"too large a body of blanks", create, strings.Repeat(" ", 2<<20), 413, "larger than"},
		{"pausing files without pausing", create, field("autoPauseMemory", "false"), 400, "autoPause"},
		{"pausing files and waking by traffic", create, field("autoPause", `true,"autoPauseMemory":false,"autoResume":{"enabled":true}`), 400, "autoResume"},
		{"automatic pause of a wrong type", create, field("autoPause", `"yes"`), 400, "autoPause: want a boolean"},
		{"automatic resume of a wrong type", create, field("autoResume", "true"), 400, "autoResume: want an object"},
		{"automatic resume of a wrong type inside", create, field("autoResume", `{"enabled":1}`), 400, "autoResume.enabled: want a boolean"},
		{"MCP", create, field("mcp", `{"x":{}}`), 501, "mcp"},
		{"IAM", create, field("iam", `{"tokens":{"a":{}}}`), 501, "iam"},
		{"volumes", create, field("volumeMounts", `[{"name":"a","path":"/b"}]`), 501, "volumeMounts"},
		{"allowed addresses", create, field("network", `{"allowOut":["1.1.1.1"]}`), 501, "network.allowOut"},
		{"denied addresses", create, field("network", `{"denyOut":["0.0.0.0/0","8.8.8.8"]}`), 501, "network.denyOut"},
		{"ports of a wrong type", create, field("network", `{"allowPublicTraffic":"no"}`), 400, "network.allowPublicTraffic: want a boolean"},
		{"protected ports beside an open guest agent", "POST /sandboxes", field("network", `{"allowPublicTraffic":false}`), 400, "has to be secured"},
		{"a mask of a wrong type", create, field("network", `{"maskRequestHost":5}`), 400, "network.maskRequestHost: want a string"},
		{"a mask that is a URL", create, field("network", `{"maskRequestHost":"http://x/"}`), 400, "maskRequestHost"},
		{"a mask with a header in it", create, field("network", `{"maskRequestHost":"x\r\nY: z"}`), 400, "maskRequestHost"},
		{"a mask with another variable", create, field("network", `{"maskRequestHost":"${HOST}"}`), 400, "${PORT}"},
		{"TLS ports", create, field("network", `{"httpsPorts":[443]}`), 501, "network.httpsPorts"},
		{"an egress proxy", create, field("network", `{"egressProxy":{"address":"x"}}`), 501, "network.egressProxy"},
		{"rules", create, field("network", `{"rules":{"x":[]}}`), 501, "network.rules"},
		{"the first generation too", "POST /sandboxes", `{}`, 400, "templateID"},
		{"secure of a wrong type", "POST /sandboxes", field("secure", "1"), 400, "secure: want a boolean"},

		{"no port of a preview link", "POST " + box + "/preview-links", "{}", 400, "port is missing"},
		{"no body of a preview link", "POST " + box + "/preview-links", "", 400, "missing"},
		{"port 0", "POST " + box + "/preview-links", `{"port":0}`, 400, "1 to 65535"},
		{"port 65536", "POST " + box + "/preview-links", `{"port":65536}`, 400, "1 to 65535"},
		{"a port that wraps to a good one", "POST " + box + "/preview-links", `{"port":4294967376}`, 400, "1 to 65535"},
		{"a port in words", "POST " + box + "/preview-links", `{"port":"80"}`, 400, "port: want an integer"},
		{"a preview of the guest agent", "POST " + box + "/preview-links", `{"port":49983}`, 400, "access token"},
		{"a preview of no time", "POST " + box + "/preview-links", `{"port":80,"expiresIn":0}`, 400, "604800"},
		{"a preview of negative time", "POST " + box + "/preview-links", `{"port":80,"expiresIn":-1}`, 400, "604800"},
		{"a preview of too long a time", "POST " + box + "/preview-links", `{"port":80,"expiresIn":604801}`, 400, "604800"},
		{"a preview that overflows", "POST " + box + "/preview-links", `{"port":80,"expiresIn":9223372036854775807}`, 400, "604800"},
		{"a preview of an unknown one", "POST /sandboxes/" + unknown + "/preview-links", `{"port":80}`, 404, ""},

		{"an unknown id", "GET /sandboxes/" + unknown, "", 404, unknown},
		{"an id that is too long", "GET /sandboxes/" + id + "a", "", 404, ""},
		{"an id in capitals", "GET /sandboxes/" + strings.ToUpper(id) + "A", "", 404, ""},
		{"an id with NUL", "GET /sandboxes/" + id + "%00", "", 404, ""},
		{"an id with a newline", "GET /sandboxes/" + id + "%0A", "", 404, ""},
		{"an id with a slash", "GET /sandboxes/..%2F" + id, "", 404, ""},
		{"dots for an id", "GET /sandboxes/%2e%2e", "", 404, ""},
		{"a very long id", "GET /sandboxes/" + strings.Repeat("a", 5000), "", 404, "…"},
		{"to kill an unknown one", "DELETE /sandboxes/" + unknown, "", 404, ""},
		{"to kill a malformed one", "DELETE /sandboxes/non-existing-sandbox", "", 404, ""},

		{"no timeout", "POST " + box + "/timeout", "{}", 400, "timeout"},
		{"no body of a timeout", "POST " + box + "/timeout", "", 400, "missing"},
		{"a negative timeout", "POST " + box + "/timeout", `{"timeout":-5}`, 400, "timeout"},
		{"a huge timeout", "POST " + box + "/timeout", `{"timeout":9223372036854775807}`, 400, "at most"},
		{"a timeout beyond 64 bits", "POST " + box + "/timeout", `{"timeout":99999999999999999999}`, 400, "timeout"},
		{"timeout of an unknown one", "POST /sandboxes/" + unknown + "/timeout", `{"timeout":5}`, 404, ""},
		{"too long a refresh", "POST " + box + "/refreshes", `{"duration":3601}`, 400, "3600"},
		{"a negative refresh", "POST " + box + "/refreshes", `{"duration":-1}`, 400, "duration"},
		{"a refresh in words", "POST " + box + "/refreshes", `{"duration":"x"}`, 400, "duration"},
		{"to connect for no time", "POST /v2" + box + "/connect", `{"timeout":0}`, 400, "timeout"},
		{"to connect for too long", "POST /v2" + box + "/connect", `{"timeout":86401}`, 400, "at most"},
		{"to connect with a list", "POST /v2" + box + "/connect", `[1]`, 400, "an object"},
		{"to connect v1 without a time", "POST " + box + "/connect", `{}`, 400, "timeout"},
		{"to connect to an unknown one", "POST /v2/sandboxes/" + unknown + "/connect", "", 404, unknown},

		{"to connect in a wrong way", "POST /v2" + box + "/connect", `{"memory":"no"}`, 400, "memory: want a boolean"},
		{"to pause with a list", "POST " + box + "/pause", "[]", 400, "an object"},
		{"to pause in a wrong way", "POST " + box + "/pause", `{"memory":0}`, 400, "memory: want a boolean"},
		{"to pause an unknown one", "POST /sandboxes/" + unknown + "/pause", "", 404, unknown},
		{"to pause a malformed one", "POST /sandboxes/x/pause", "", 404, `"x"`},
		{"to resume one that runs", "POST " + box + "/resume", "", 409, "running"},
		{"to resume for no time", "POST " + box + "/resume", `{"timeout":0}`, 400, "timeout"},
		{"to resume for too long", "POST " + box + "/resume", `{"timeout":86401}`, 400, "at most"},
		{"to resume in words", "POST " + box + "/resume", `{"timeout":"x"}`, 400, "timeout: want an integer"},
		{"to resume with a wrong pause", "POST " + box + "/resume", `{"autoPause":[]}`, 400, "autoPause: want a boolean"},
		{"to resume an unknown one", "POST /sandboxes/" + unknown + "/resume", "", 404, unknown},
		{"no forks", "POST " + box + "/fork", `{"count":0}`, 400, "1 to 100"},
		{"too many forks", "POST " + box + "/fork", `{"count":101}`, 400, "1 to 100"},
		{"forks that wrap to a good number", "POST " + box + "/fork", `{"count":4294967297}`, 400, "1 to 100"},
		{"negative forks", "POST " + box + "/fork", `{"count":-1}`, 400, "1 to 100"},
		{"a fraction of forks", "POST " + box + "/fork", `{"count":1.5}`, 400, "count: want an integer"},
		{"forks of no time", "POST " + box + "/fork", `{"timeout":0}`, 400, "timeout"},
		{"forks of too long a time", "POST " + box + "/fork", `{"timeout":86401}`, 400, "at most"},
		{"forks of an unknown one", "POST /sandboxes/" + unknown + "/fork", "", 404, unknown},
		{"a snapshot of an unknown one", "POST /sandboxes/" + unknown + "/snapshots", "{}", 404, unknown},
		{"a snapshot with a number for a name", "POST " + box + "/snapshots", `{"name":5}`, 400, "name: want a string"},
		{"a snapshot with blanks in its name", "POST " + box + "/snapshots", `{"name":"a b"}`, 400, "name"},
		{"a snapshot with a path for a name", "POST " + box + "/snapshots", `{"name":"../x"}`, 400, "name"},
		{"a snapshot with an empty tag", "POST " + box + "/snapshots", `{"name":"x:"}`, 400, "name"},
		{"a snapshot with too long a name", "POST " + box + "/snapshots", `{"name":` + quoted(129, "x") + `}`, 400, "128"},
		{"a snapshot in another team's name", "POST " + box + "/snapshots", `{"name":"others/x"}`, 403, "your team"},
		{"a snapshot that is called as a template", "POST " + box + "/snapshots", `{"name":"default/base"}`, 400, "template"},
		{"a snapshot that is called as another's template", "POST " + box + "/snapshots", `{"name":"secret:default"}`, 400, "template"},
		{"no snapshots", "GET /snapshots?limit=0", "", 400, "limit"},
		{"too many snapshots", "GET /snapshots?limit=101", "", 400, "limit"},
		{"snapshots after a made up token", "GET /snapshots?nextToken=abc", "", 400, "nextToken"},
		{"snapshots with a malformed query", "GET /snapshots?name=%zz", "", 400, "query"},
		{"to delete an unknown snapshot", "DELETE /templates/" + unknown + "%3Adefault", "", 404, unknown},
		{"to delete what nothing is called", "DELETE /templates/..%2F..%2Fx", "", 404, "not found"},
		{"to delete another team's snapshot by name", "DELETE /templates/others%2Fx", "", 404, "not found"},
		{"to delete a template", "DELETE /templates/base", "", 501, "templates other than snapshots"},
		{"to delete another's template", "DELETE /templates/secret", "", 403, ""},
		{"events of an unknown one", "GET /sandboxes/" + unknown + "/events", "", 404, unknown},
		{"no events", "GET " + box + "/events?limit=0", "", 400, "limit"},
		{"too many events", "GET " + box + "/events?limit=1001", "", 400, "limit"},
		{"events after a negative number", "GET " + box + "/events?after=-1", "", 400, "after"},
		{"events before nothing", "GET " + box + "/events?before=0", "", 400, "before"},
		{"events in no order", "GET " + box + "/events?order=up", "", 400, "order"},

		{"no limit", "GET /v2/sandboxes?limit=0", "", 400, "limit"},
		{"too high a limit", "GET /v2/sandboxes?limit=101", "", 400, "limit"},
		{"a negative limit", "GET /v2/sandboxes?limit=-1", "", 400, "limit"},
		{"a limit beyond 64 bits", "GET /v2/sandboxes?limit=99999999999999999999", "", 400, "limit"},
		{"a limit in words", "GET /v2/sandboxes?limit=ten", "", 400, "limit"},
		{"an unknown state", "GET /v2/sandboxes?state=running,dead", "", 400, "state"},
		{"an empty state", "GET /v2/sandboxes?state=running,", "", 400, "state"},
		{"an unknown order", "GET /v2/sandboxes?order=up", "", 400, "order"},
		{"a time that is none", "GET /v2/sandboxes?startedAfter=yesterday", "", 400, "startedAfter"},
		{"a time out of range", "GET /v2/sandboxes?startedAfter=9999-01-01T00:00:00Z", "", 400, "startedAfter"},
		{"a made up token", "GET /v2/sandboxes?nextToken=abc", "", 400, "nextToken"},
		{"a token that is no base64", "GET /v2/sandboxes?nextToken=%00", "", 400, "nextToken"},
		{"metadata without a value", "GET /v2/sandboxes?metadata=a", "", 400, "metadata"},
		{"metadata badly encoded", "GET /sandboxes?metadata=a%3D%25", "", 400, "metadata"},
		{"metadata with NUL to filter by", "GET /sandboxes?metadata=a%3D%2500", "", 400, "metadata"},
		{"many pairs", "GET /sandboxes?metadata=" + url.QueryEscape(strings.Repeat("a=b&", 99)), "", 400, "metadata"},
		{"a malformed query", "GET /v2/sandboxes?limit=%zz", "", 400, "query"},
		{"a query with semicolons", "GET /v2/sandboxes?limit=1;order=asc", "", 400, "query"},

		{"metrics from a negative time", "GET " + box + "/metrics?start=-1", "", 400, "start"},
		{"metrics from too far a time", "GET " + box + "/metrics?end=9223372036854775807", "", 400, "end"},
		{"metrics that end before they start", "GET " + box + "/metrics?start=5&end=4", "", 400, "start"},
		{"metrics of an unknown one", "GET /sandboxes/" + unknown + "/metrics", "", 404, ""},
		{"metrics of none", "GET /sandboxes/metrics", "", 400, "sandbox_ids"},
		{"metrics of too many", "GET /sandboxes/metrics?sandbox_ids=" + strings.Repeat("a,", 100) + "a", "", 400, "at most 100"},
		{"logs of an unknown one", "GET /sandboxes/" + unknown + "/logs", "", 404, ""},
		{"logs from a negative time", "GET " + box + "/logs?start=-1", "", 400, "start"},
		{"logs with too high a limit", "GET /v2" + box + "/logs?limit=1001", "", 400, "limit"},
		{"logs in no direction", "GET /v2" + box + "/logs?direction=up", "", 400, "direction"},
		{"logs of no level", "GET /v2" + box + "/logs?level=loud", "", 400, "level"},
		{"logs with too long a search", "GET /v2" + box + "/logs?search=" + strings.Repeat("a", 257), "", 400, "search"},
		{"a made up token of templates", "GET /v2/templates?nextToken=x", "", 400, "nextToken"},

		{"events in E2B's shape", "GET /events/sandboxes/" + id, "", 501, "GET /sandboxes/{sandboxID}/events"},
		{"to build a template", "POST /v3/templates", "{}", 501, "is not served yet"},
		{"to tag a template", "POST /templates/tags", "{}", 501, "tagging"},
		{"an unknown route", "GET /nope", "", 404, "no such route"},
		{"the root", "GET /", "", 404, "no such route"},
		{"a trailing slash", "GET /sandboxes/", "", 404, "no such route"},
		{"a doubled slash", "GET //sandboxes", "", 404, "no such route"},
		{"dots in a route", "GET /templates/../sandboxes", "", 404, "no such route"},
		{"a wrong method", "PATCH " + box, "", 405, "method"},
		{"another wrong method", "DELETE /v2/sandboxes", "", 405, "method"},
	} {
		t.Run(c.name, func(t *testing.T) {
			method, path, _ := strings.Cut(c.operation, " ")
			var body any
			if c.body != "" {
				body = strings.NewReader(c.body)
			}
			r := *r
			r.t = t
			a := r.do(method, path, body)
			if text := r.fails(a, c.status, c.says); len(text) > 300 {
				t.Errorf("the message has %d bytes", len(text))
			}
			if c.status == 405 && a.Header.Get("Allow") == "" {
				t.Error("405 does not say what is allowed")
			}
		})
	}
	// Nothing was half-created or changed by any of it.
	list, err := r.store.Sandboxes().List(t.Context(), store.Filter{})
	if err != nil || len(list) != 1 || list[0].State != sandbox.Running {
		t.Errorf("records after it all: %v, %v", list, err)
	}
	same(t, "sandboxes on the host", r.agent.Living(), []string{id})
}

func TestSandboxesOfAnotherOwnerAreNotFound(t *testing.T) {
	r := newRig(t)
	id := r.create(map[string]any{})["sandboxID"].(string)
	for _, c := range []struct{ operation, body string }{
		{"GET /sandboxes/" + id, ""},
		{"DELETE /sandboxes/" + id, ""},
		{"POST /sandboxes/" + id + "/timeout", `{"timeout":1}`},
		{"POST /sandboxes/" + id + "/refreshes", ""},
		{"POST /sandboxes/" + id + "/connect", `{"timeout":1}`},
		{"POST /v2/sandboxes/" + id + "/connect", ""},
		{"GET /sandboxes/" + id + "/metrics", ""},
		{"GET /sandboxes/" + id + "/logs", ""},
		{"GET /v2/sandboxes/" + id + "/logs", ""},
		{"GET /sandboxes/" + id + "/events", ""},
		{"POST /sandboxes/" + id + "/pause", ""},
		{"POST /sandboxes/" + id + "/resume", ""},
		{"POST /sandboxes/" + id + "/fork", ""},
		{"POST /sandboxes/" + id + "/snapshots", "{}"},
	} {
		method, path, _ := strings.Cut(c.operation, " ")
		text := r.fails(r.do(method, path, strings.NewReader(c.body), "X-API-Key", foreignKey), 404)
		missing := strings.Replace(path, id, "aaaaaaaaaaaaaaaaaaaa", 1)
		if other := r.fails(r.do(method, missing, strings.NewReader(c.body), "X-API-Key", foreignKey), 404); strings.Replace(other, "aaaaaaaaaaaaaaaaaaaa", id, 1) != text {
			t.Errorf("%s: %q tells it from an unknown one: %q", c.operation, text, other)
		}
	}
	r.object(r.do("GET", "/sandboxes/"+id, nil), 200)
}

func TestAMalformedPathIsRefused(t *testing.T) {
	r := newRig(t)
	conn, err := net.Dial("tcp", strings.TrimPrefix(r.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("GET /sandboxes/%zz HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	status := make([]byte, 12)
	if _, err := conn.Read(status); err != nil || string(status) != "HTTP/1.1 400" {
		t.Errorf("%q, %v", status, err)
	}
}

func TestTheDescriptionListsWhatIsServed(t *testing.T) {
	text, err := os.ReadFile("../../../api/openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, paths, _ := strings.Cut(string(text), "\npaths:\n")
	paths, _, _ = strings.Cut(paths, "\ncomponents:\n")
	var described []string
	path := ""
	for _, m := range regexp.MustCompile(`(?m)^  (/\S*):$|^    (get|put|post|patch|delete):$`).FindAllStringSubmatch(paths, -1) {
		if m[1] != "" {
			path = m[1]
		} else {
			described = append(described, strings.ToUpper(m[2])+" "+path)
		}
	}
	slices.Sort(described)
	if len(described) == 0 {
		t.Fatal("no operation found in the description")
	}
	same(t, "operations", e2b.Served(), described)

	// And what is said to be served is, what is not answers 501.
	r := newRig(t)
	for _, operation := range described {
		method, path, _ := strings.Cut(operation, " ")
		if a := r.do(method, strings.NewReplacer("{", "", "}", "").Replace(path), nil); a.StatusCode == 501 || a.StatusCode == 405 {
			t.Errorf("%s: %s", operation, a.body)
		}
	}
}
