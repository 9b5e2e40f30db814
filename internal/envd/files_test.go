package envd_test

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"mime/multipart"
	"net/textproto"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/api/proto/filesystem"
	"github.com/wrenn/wrenn/internal/envd/access"
)

const octets = "application/octet-stream"

func gzipped(t *testing.T, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	w.Write(data)
	w.Close()
	return buf.Bytes()
}

// form makes a multipart body of (part name, file name, content) triples.
func form(t *testing.T, triples ...string) (body []byte, contentType string) {
	t.Helper()
	var buf bytes.Buffer
	w := multipart.NewWriter(&buf)
	for i := 0; i < len(triples); i += 3 {
		h := textproto.MIMEHeader{}
		h.Set("Content-Disposition", `form-data; name="`+triples[i]+`"; filename="`+triples[i+1]+`"`)
		part, err := w.CreatePart(h)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(part, triples[i+2])
	}
	w.Close()
	return buf.Bytes(), w.FormDataContentType()
}

func filesURL(path string, more ...string) string {
	q := url.Values{}
	if path != "" {
		q.Set("path", path)
	}
	for i := 0; i < len(more); i += 2 {
		q.Set(more[i], more[i+1])
	}
	return "/files?" + q.Encode()
}

func TestUploadedFilesReadBackTheSame(t *testing.T) {
	a := startAgent(t)
	dir := t.TempDir()
	content := bytes.Repeat([]byte("line of text\x00\xff\n"), 300000) // 4.5 MB
	for _, tc := range []struct {
		name   string
		body   []byte
		header []string
	}{
		{"octet-stream", content, []string{"Content-Type", octets}},
		{"gzip", gzipped(t, content), []string{"Content-Type", octets, "Content-Encoding", "gzip"}},
		{"no content type", content, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := dir + "/new/" + tc.name + "/file name?&#%.bin"
			status, _, body := a.call(t, "POST", filesURL(path), tc.body, tc.header...)
			var entries []struct{ Name, Path, Type string }
			if err := json.Unmarshal(body, &entries); err != nil || status != 200 || len(entries) != 1 ||
				entries[0].Path != path || entries[0].Name != filepath.Base(path) || entries[0].Type != "file" {
				t.Fatalf("got %d %s", status, body)
			}
			status, h, got := a.call(t, "GET", filesURL(path), nil)
			if status != 200 || !bytes.Equal(got, content) || h.Get("Content-Length") != strconv.Itoa(len(content)) || h.Get("Vary") != "Accept-Encoding" {
				t.Errorf("plain: got %d, %d bytes, %v", status, len(got), h)
			}
			_, h, got = a.call(t, "GET", filesURL(path), nil, "Accept-Encoding", "gzip, deflate")
			zr, err := gzip.NewReader(bytes.NewReader(got))
			if err != nil || h.Get("Content-Encoding") != "gzip" {
				t.Fatalf("gzip: %v %v", err, h)
			}
			if plain, err := io.ReadAll(zr); err != nil || !bytes.Equal(plain, content) {
				t.Errorf("gzip: %d bytes, %v", len(plain), err)
			}
		})
	}
}

func TestDownloadHonoursRangesConditionsAndEncodings(t *testing.T) {
	a := startAgent(t)
	path := t.TempDir() + "/f.txt"
	os.WriteFile(path, []byte("0123456789"), 0o644)
	_, first, _ := a.call(t, "GET", filesURL(path), nil)
	for _, tc := range []struct {
		name   string
		header []string
		status int
		body   string
	}{
		{"a range", []string{"Range", "bytes=2-4"}, 206, "234"},
		{"a range is never encoded", []string{"Range", "bytes=-3", "Accept-Encoding", "gzip"}, 206, "789"},
		{"a range beyond the end", []string{"Range", "bytes=50-"}, 416, ""},
		{"not modified", []string{"If-Modified-Since", first.Get("Last-Modified")}, 304, ""},
		{"modified", []string{"If-Modified-Since", time.Now().Add(-time.Hour).UTC().Format("Mon, 02 Jan 2006 15:04:05 GMT")}, 200, "0123456789"},
		{"gzip weighed below identity", []string{"Accept-Encoding", "gzip;q=0.3, identity;q=0.8"}, 200, "0123456789"},
		{"nothing acceptable", []string{"Accept-Encoding", "br, identity;q=0"}, 406, ""},
		{"a range without identity", []string{"Accept-Encoding", "gzip, identity;q=0", "Range", "bytes=0-1"}, 406, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			header := tc.header
			if !strings.Contains(strings.Join(header, " "), "Accept-Encoding") {
				header = append(header, "Accept-Encoding", "identity")
			}
			status, _, body := a.call(t, "GET", filesURL(path), nil, header...)
			if status != tc.status || (tc.body != "" && string(body) != tc.body) {
				t.Errorf("got %d %q", status, body)
			}
		})
	}
	if status, _, body := a.call(t, "GET", filesURL("/proc/self/status"), nil); status != 200 || !bytes.Contains(body, []byte("VmRSS")) {
		t.Errorf("a file of /proc has no size but content: got %d %.40q", status, body)
	}
}

func TestFileErrorsHaveTheirStatus(t *testing.T) {
	a := startAgent(t)
	dir := t.TempDir()
	os.WriteFile(dir+"/f", []byte("old"), 0o644)
	broken, brokenType := form(t, "file", dir+"/part", "content")
	twice, twiceType := form(t, "file", "x", "1", "file", "y", "2")
	nameless, namelessType := form(t, "file", "", "content")
	for _, tc := range []struct {
		name, method, url string
		body              []byte
		header            []string
		status            int
	}{
		{"read a directory", "GET", filesURL(dir), nil, nil, 400},
		{"read what is not there", "GET", filesURL(dir + "/none"), nil, nil, 404},
		{"read below a file", "GET", filesURL(dir + "/f/x"), nil, nil, 400},
		{"read as an unknown user", "GET", filesURL(dir+"/f", "username", "nosuch"), nil, nil, 401},
		{"NUL in the path", "GET", filesURL("/a\x00b"), nil, nil, 400},
		{"somebody else's home", "GET", filesURL("~root/x"), nil, nil, 400},
		{"write a directory", "POST", filesURL(dir), []byte("x"), []string{"Content-Type", octets}, 400},
		{"write below a file", "POST", filesURL(dir + "/f/x"), []byte("x"), []string{"Content-Type", octets}, 400},
		{"write without a path", "POST", "/files", []byte("x"), []string{"Content-Type", octets}, 400},
		{"write as an unknown user", "POST", filesURL(dir+"/g", "username", "nosuch"), []byte("x"), []string{"Content-Type", octets}, 401},
		{"a name too long", "POST", filesURL(dir + "/" + strings.Repeat("n", 300)), []byte("x"), []string{"Content-Type", octets}, 400},
		{"not gzip", "POST", filesURL(dir + "/g"), []byte("x"), []string{"Content-Type", octets, "Content-Encoding", "gzip"}, 400},
		{"gzip cut short", "POST", filesURL(dir + "/f"), gzipped(t, []byte("hello"))[:20], []string{"Content-Type", octets, "Content-Encoding", "gzip"}, 400},
		{"unknown encoding", "POST", filesURL(dir + "/g"), []byte("x"), []string{"Content-Encoding", "br"}, 400},
		{"multipart without boundary", "POST", "/files", []byte("x"), []string{"Content-Type", "multipart/form-data"}, 400},
		{"multipart cut short", "POST", "/files", broken[:len(broken)-10], []string{"Content-Type", brokenType}, 400},
		{"multipart without a part", "POST", filesURL(dir + "/g"), []byte("x"), []string{"Content-Type", brokenType}, 400},
		{"multipart without an end", "POST", filesURL(dir + "/g2"), bytes.TrimSuffix(broken, []byte("--\r\n")), []string{"Content-Type", brokenType}, 400},
		{"two files for one path", "POST", filesURL(dir + "/g2"), twice, []string{"Content-Type", twiceType}, 400},
		{"a part without a name", "POST", "/files", nameless, []string{"Content-Type", namelessType}, 400},
		{"metadata that is not ASCII", "POST", filesURL(dir + "/g"), []byte("x"), []string{"Content-Type", octets, "X-Metadata-A", "\xc3\xa9"}, 400},
		{"metadata too large", "POST", filesURL(dir + "/g"), []byte("x"), []string{"Content-Type", octets, "X-Metadata-A", strings.Repeat("m", 4096)}, 400},
		{"metadata key too long", "POST", filesURL(dir + "/g"), []byte("x"), []string{"Content-Type", octets, "X-Metadata-" + strings.Repeat("k", 247), "v"}, 400},
	} {
		t.Run(tc.name, func(t *testing.T) {
			status, _, body := a.call(t, tc.method, tc.url, tc.body, tc.header...)
			var shape struct {
				Code    int
				Message string
			}
			if err := json.Unmarshal(body, &shape); status != tc.status || err != nil || shape.Code != status || shape.Message == "" {
				t.Errorf("got %d %s, want %d", status, body, tc.status)
			}
		})
	}
	if got, _ := os.ReadFile(dir + "/f"); string(got) != "old" {
		t.Errorf("a failed upload changed the file to %q", got)
	}
	left, _ := os.ReadDir(dir)
	for _, e := range left {
		if e.Name() != "f" && e.Name() != "g2" {
			t.Errorf("a failed upload left %s", e.Name())
		}
	}
}

func TestMultipartStoresEveryFileUnderItsFullName(t *testing.T) {
	a := startAgent(t)
	dir := t.TempDir()
	body, contentType := form(t, "file", dir+"/a/one", "1", "other", dir+"/ignored", "x", "file", dir+"/b/two", "2")
	status, _, answer := a.call(t, "POST", "/files", body, "Content-Type", contentType, "X-Metadata-Tag", "t")
	var entries []struct {
		Path     string
		Metadata map[string]string
	}
	if err := json.Unmarshal(answer, &entries); err != nil || status != 200 || len(entries) != 2 || entries[1].Path != dir+"/b/two" || entries[1].Metadata["tag"] != "t" {
		t.Fatalf("got %d %s", status, answer)
	}
	if got, _ := os.ReadFile(dir + "/a/one"); string(got) != "1" {
		t.Errorf("got %q", got)
	}
	if _, err := os.Stat(dir + "/ignored"); err == nil {
		t.Error("a part that is not a file was stored")
	}
	stat, err := a.filesystem().Stat(t.Context(), &filesystem.StatRequest{Path: dir + "/a/one"})
	if err != nil || stat.GetEntry().GetMetadata()["tag"] != "t" {
		t.Errorf("got %v, %v", stat, err)
	}
}

func TestOverwritingKeepsModeLinksAndSpecialFiles(t *testing.T) {
	needRoot(t)
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Skip("there is no account nobody")
	}
	a := startAgent(t)
	dir := t.TempDir()
	upload := func(path, content string, header ...string) {
		t.Helper()
		header = append(header, "Content-Type", octets)
		if status, _, body := a.call(t, "POST", filesURL(path, "username", "nobody"), content, header...); status != 200 {
			t.Fatalf("%s: %d %s", path, status, body)
		}
	}
	upload(dir+"/deep/er/f", "1", "X-Metadata-K", "v")
	for _, path := range []string{"/deep", "/deep/er", "/deep/er/f"} {
		info, err := os.Stat(dir + path)
		if err != nil || strconv.Itoa(int(info.Sys().(*syscall.Stat_t).Uid)) != nobody.Uid {
			t.Errorf("%s does not belong to the user: %v", path, err)
		}
	}
	os.Chmod(dir+"/deep/er/f", 0o750)
	os.Symlink("deep/er/f", dir+"/link")
	upload(dir+"/link", "22")
	if info, _ := os.Lstat(dir + "/link"); info.Mode()&os.ModeSymlink == 0 {
		t.Error("the link was replaced by a file")
	}
	info, err := os.Stat(dir + "/deep/er/f")
	if err != nil || info.Mode().Perm() != 0o750 || info.Size() != 2 {
		t.Errorf("got %v, %v", info, err)
	}
	if n, err := unix.Listxattr(dir+"/deep/er/f", nil); n != 0 {
		t.Errorf("the old file's metadata are still there: %d bytes, %v", n, err)
	}
	os.Symlink("made-by-link", dir+"/dangling")
	upload(dir+"/dangling", "3")
	if got, _ := os.ReadFile(dir + "/made-by-link"); string(got) != "3" {
		t.Errorf("through a dangling link: %q", got)
	}
	upload("/dev/null", "x")
	if info, _ := os.Stat("/dev/null"); info.Mode()&os.ModeCharDevice == 0 {
		t.Fatal("/dev/null was replaced by a file")
	}
}

func TestAMountedFileIsWrittenInPlace(t *testing.T) {
	needRoot(t)
	a := startAgent(t)
	dir := t.TempDir()
	os.WriteFile(dir+"/source", []byte("old and long"), 0o644)
	os.WriteFile(dir+"/target", nil, 0o644)
	if err := unix.Mount(dir+"/source", dir+"/target", "", unix.MS_BIND, ""); err != nil {
		t.Skipf("cannot mount: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir+"/target", 0) })
	if status, _, body := a.call(t, "POST", filesURL(dir+"/target"), "new", "Content-Type", octets); status != 200 {
		t.Fatalf("%d %s", status, body)
	}
	if got, _ := os.ReadFile(dir + "/source"); string(got) != "new" {
		t.Errorf("got %q", got)
	}
	if left, _ := filepath.Glob(dir + "/.*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestAFullDiskAnswers507AndLeavesTheOldFile(t *testing.T) {
	needRoot(t)
	a := startAgent(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("cannot mount: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, 0) })
	os.WriteFile(dir+"/f", []byte("old"), 0o644)
	status, _, body := a.call(t, "POST", filesURL(dir+"/f"), make([]byte, 4<<20), "Content-Type", octets)
	if status != 507 || !strings.Contains(string(body), "not enough disk space") {
		t.Errorf("got %d %s", status, body)
	}
	if got, _ := os.ReadFile(dir + "/f"); string(got) != "old" {
		t.Errorf("the file is now %d bytes", len(got))
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

func TestAnInterruptedUploadLeavesTheOldFile(t *testing.T) {
	a := startAgent(t)
	dir := t.TempDir()
	os.WriteFile(dir+"/f", []byte("old"), 0o644)
	r, w := io.Pipe()
	go func() {
		w.Write(make([]byte, 32<<20)) // more than sockets hold: the agent has taken some
		w.CloseWithError(errors.New("gone"))
	}()
	resp, err := a.http.Post(a.url+filesURL(dir+"/f"), octets, r)
	if err == nil {
		resp.Body.Close()
		t.Fatalf("got %d", resp.StatusCode)
	}
	eventually(t, "only the old file is there", func() bool { left, _ := os.ReadDir(dir); return len(left) == 1 })
	if got, _ := os.ReadFile(dir + "/f"); string(got) != "old" {
		t.Errorf("the file is now %q", got)
	}
}

func TestComposeJoinsPartsAndRemovesThem(t *testing.T) {
	a := startAgent(t)
	dir := t.TempDir()
	tree(t, dir, "p1", "p2", "dir/")
	compose := func(sources []string, destination string) (int, string) {
		status, _, body := a.call(t, "POST", "/files/compose", map[string]any{"source_paths": sources, "destination": destination})
		return status, string(body)
	}
	for _, tc := range []struct {
		name        string
		sources     []string
		destination string
		status      int
	}{
		{"no sources", nil, dir + "/all", 400},
		{"no destination", []string{dir + "/p1"}, "", 400},
		{"a source missing", []string{dir + "/p1", dir + "/p3"}, dir + "/all", 404},
		{"a source a directory", []string{dir + "/dir"}, dir + "/all", 400},
		{"a source the destination", []string{dir + "/p1", dir + "/./p2"}, dir + "/p2", 400},
	} {
		if status, body := compose(tc.sources, tc.destination); status != tc.status {
			t.Errorf("%s: got %d %s", tc.name, status, body)
		}
	}
	if status, body := compose([]string{dir + "/p2", dir + "/p1"}, dir+"/new/all"); status != 200 || !strings.Contains(body, dir+"/new/all") {
		t.Fatalf("got %d %s", status, body)
	}
	if got, _ := os.ReadFile(dir + "/new/all"); string(got) != "p2p1" {
		t.Errorf("got %q", got)
	}
	if left, _ := os.ReadDir(dir); len(left) != 2 {
		t.Errorf("left: %v", left)
	}
}

func TestSignedURLsOpenOneFileForOneOperation(t *testing.T) {
	a := startAgent(t)
	const token = "secret"
	path := t.TempDir() + "/f"
	os.WriteFile(path, []byte("content"), 0o644)
	a.init(t, map[string]any{"accessToken": token})
	in := func(d time.Duration) string { return strconv.FormatInt(time.Now().Add(d).Unix(), 10) }
	soon, past := in(time.Minute), in(-time.Minute)
	read := access.Sign(path, access.Read, "root", token, "")
	for _, tc := range []struct {
		name, method string
		query        []string
		status       int
		text         string
	}{
		{"signed", "GET", []string{"username", "root", "signature", read}, 200, "content"},
		{"signed with expiry", "GET", []string{"signature", access.Sign(path, access.Read, "", token, soon), "signature_expiration", soon}, 200, "content"},
		{"expired", "GET", []string{"signature", access.Sign(path, access.Read, "", token, past), "signature_expiration", past}, 401, "signature is already expired"},
		{"expiry taken off", "GET", []string{"signature", access.Sign(path, access.Read, "", token, soon)}, 401, "invalid signature"},
		{"expiry put on", "GET", []string{"username", "root", "signature", read, "signature_expiration", soon}, 401, "invalid signature"},
		{"other user", "GET", []string{"signature", read}, 401, "invalid signature"},
		{"other operation", "POST", []string{"username", "root", "signature", read}, 401, "invalid signature"},
		{"none", "GET", nil, 401, "missing signature query parameter"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			status, _, body := a.call(t, tc.method, filesURL(path, tc.query...), nil)
			if status != tc.status || !strings.Contains(string(body), tc.text) {
				t.Errorf("got %d %s", status, body)
			}
		})
	}
	status, _, body := a.call(t, "GET", filesURL(path, "signature", read), nil, "X-Access-Token", "wrong")
	if status != 401 || !strings.Contains(string(body), "does not match") {
		t.Errorf("a wrong token beside a signature: got %d %s", status, body)
	}
	read = access.Sign(path, access.Read, "", token, "")
	status, _, body = a.call(t, "GET", filesURL(path, "signature", read), nil, "Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte("nobody-signed-this:")))
	if status != 200 {
		t.Errorf("a user beside a signature that names none was heeded: got %d %s", status, body)
	}
	if status, _, _ := a.call(t, "GET", filesURL(path), nil, "X-Access-Token", token); status != 200 {
		t.Errorf("the token alone: got %d", status)
	}
}
