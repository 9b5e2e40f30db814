package files

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/envd/access"
	"github.com/wrenn/wrenn/internal/envd/filemeta"
	"github.com/wrenn/wrenn/internal/envd/settings"
	"github.com/wrenn/wrenn/internal/envd/user"
)

func handler() *Handler {
	return NewHandler(&access.Guard{}, &settings.Settings{}, slog.New(slog.DiscardHandler))
}

func call(t *testing.T, do http.HandlerFunc, method, target string, body io.Reader, header ...string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequest(method, target, body)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	do(w, r)
	return w
}

func at(path string) string { return "/files?path=" + url.QueryEscape(path) }

func TestSpecialFilesNeverHangTheAgent(t *testing.T) {
	h, dir := handler(), t.TempDir()
	if err := unix.Mkfifo(dir+"/fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: dir + "/sock"}); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, method, path string
		status             int
	}{
		{"a pipe that nobody writes is empty", "GET", dir + "/fifo", 200},
		{"a pipe cannot be uploaded to", "POST", dir + "/fifo", 400},
		{"a socket cannot be read", "GET", dir + "/sock", 400},
		{"a socket cannot be uploaded to", "POST", dir + "/sock", 400},
		{"the head of an endless file", "HEAD", "/dev/zero", 200},
	} {
		t.Run(tc.name, func(t *testing.T) {
			do := h.Download
			if tc.method == "POST" {
				do = h.Upload
			}
			if w := call(t, do, tc.method, at(tc.path), strings.NewReader("x")); w.Code != tc.status {
				t.Errorf("got %d %s", w.Code, w.Body)
			}
			if w := call(t, do, tc.method, at(tc.path), strings.NewReader("x"), "Accept-Encoding", "gzip"); w.Code != tc.status {
				t.Errorf("with gzip: got %d %s", w.Code, w.Body)
			}
		})
	}
}

func TestAFileThatCannotBeReadIsNoEmptyOne(t *testing.T) {
	// There is nothing at address 0.
	if w := call(t, handler().Download, "GET", at("/proc/self/mem"), nil); w.Code != 500 {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
}

func TestASizeThatIsMadeUpIsNotPromised(t *testing.T) {
	const path = "/sys/devices/system/cpu/possible"
	want, err := os.ReadFile(path)
	if info, statErr := os.Stat(path); err != nil || statErr != nil || info.Size() == int64(len(want)) {
		t.Skipf("no file with such a size: %v", err)
	}
	for _, ranges := range []string{"", "bytes=0-1000"} {
		w := call(t, handler().Download, "GET", at(path), nil, "Range", ranges)
		if got := w.Header().Get("Content-Length"); w.Body.String() != string(want) || got != "" {
			t.Errorf("got %q, said to be %s bytes", w.Body, got)
		}
	}
}

func TestADownloadWithoutEndEndsWithItsClient(t *testing.T) {
	h, dir := handler(), t.TempDir()
	if err := unix.Mkfifo(dir+"/silent", 0o666); err != nil {
		t.Fatal(err)
	}
	writer, err := os.OpenFile(dir+"/silent", os.O_RDWR, 0) // a writer that says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	served := make(chan struct{}, 2)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() { served <- struct{}{} }()
		h.Download(w, r)
	}))
	defer server.Close()
	for _, path := range []string{"/dev/zero", dir + "/silent"} {
		ctx, cancel := context.WithCancel(t.Context())
		r, err := http.NewRequestWithContext(ctx, "GET", server.URL+at(path), nil)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			resp, err := server.Client().Do(r)
			if err == nil {
				io.CopyN(io.Discard, resp.Body, 1<<20)
				resp.Body.Close()
			}
		}()
		if path == "/dev/zero" {
			<-served // the client leaves after a megabyte
		} else {
			time.AfterFunc(50*time.Millisecond, cancel)
			<-served
		}
		cancel()
	}
}

func TestRangesAndConditions(t *testing.T) {
	h, path := handler(), t.TempDir()+"/f.txt"
	os.WriteFile(path, []byte("0123456789"), 0o644)
	tag := call(t, h.Download, "GET", at(path), nil).Header().Get("ETag")
	if tag == "" {
		t.Fatal("no ETag")
	}
	for _, tc := range []struct {
		name   string
		method string
		header []string
		status int
		body   string
	}{
		{"several ranges", "GET", []string{"Range", "bytes=0-1,4-5"}, 206, "45"},
		{"a suffix longer than the file", "GET", []string{"Range", "bytes=-50"}, 206, "0123456789"},
		{"a range that ends before it begins", "GET", []string{"Range", "bytes=5-2"}, 416, ""},
		{"a range beyond the end", "GET", []string{"Range", "bytes=10-"}, 416, ""},
		{"no range at all", "GET", []string{"Range", "lines=1-2"}, 416, ""},
		{"the same content", "GET", []string{"If-None-Match", tag, "Accept-Encoding", "gzip"}, 304, ""},
		{"other content", "GET", []string{"If-None-Match", `"x"`}, 200, "0123456789"},
		{"must be the same and is", "GET", []string{"If-Match", tag, "Accept-Encoding", "gzip"}, 200, "0123456789"},
		{"must be the same and is not", "GET", []string{"If-Match", `"x"`, "Accept-Encoding", "gzip"}, 412, ""},
		{"the rest, if it is the same", "GET", []string{"If-Range", tag, "Range", "bytes=8-"}, 206, "89"},
		{"all, since it is not", "GET", []string{"If-Range", `"x"`, "Range", "bytes=8-"}, 200, "0123456789"},
		{"the head alone", "HEAD", nil, 200, ""},
		{"refused by weight", "GET", []string{"Accept-Encoding", "gzip;q=0, *;q=0"}, 406, ""},
		{"garbage", "GET", []string{"Accept-Encoding", ";;q=,\x01,=;q=7,gzip\x00"}, 200, "0123456789"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := call(t, h.Download, tc.method, at(path), nil, tc.header...)
			if w.Code != tc.status || !strings.Contains(w.Body.String(), tc.body) || (tc.method == "HEAD" && w.Body.Len() > 0) {
				t.Errorf("got %d %q", w.Code, w.Body)
			}
		})
	}
	os.WriteFile(path+".new", []byte("9876543210"), 0o644)
	os.Rename(path+".new", path)
	if other := call(t, h.Download, "GET", at(path), nil).Header().Get("ETag"); other == tag {
		t.Errorf("another file has the same tag %s", tag)
	}
}

func TestWhatDoesNotCompressIsSentAsItIs(t *testing.T) {
	h, dir := handler(), t.TempDir()
	random := make([]byte, 1<<20)
	unix.Getrandom(random[:256], 0)
	for n := 256; n < len(random); n += 256 {
		unix.Getrandom(random[n:n+256], 0)
	}
	os.WriteFile(dir+"/random", random, 0o644)
	os.WriteFile(dir+"/text", bytes.Repeat([]byte("text "), 1<<18), 0o644)
	for _, tc := range []struct{ name, accept, coding string }{
		{"random", "gzip, deflate", ""}, {"random", "gzip, identity;q=0", "gzip"}, {"text", "gzip, deflate", "gzip"},
	} {
		w := call(t, h.Download, "GET", at(dir+"/"+tc.name), nil, "Accept-Encoding", tc.accept)
		if got := w.Header().Get("Content-Encoding"); got != tc.coding || w.Code != 200 {
			t.Errorf("%s for %q: got %d %q", tc.name, tc.accept, w.Code, got)
		}
		if tc.coding == "" && !bytes.Equal(w.Body.Bytes(), random) {
			t.Error("the content is not the file's")
		}
	}
}

// cut is a body that breaks off as bodies do.
type cut struct{ *bytes.Reader }

func (c cut) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func TestABodyCutShortChangesNothing(t *testing.T) {
	h, dir := handler(), t.TempDir()
	os.WriteFile(dir+"/f", []byte("old"), 0o644)
	var zipped bytes.Buffer
	zw := gzip.NewWriter(&zipped)
	io.CopyN(zw, zeros{}, 3<<20)
	zw.Close()
	form := "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"x\"\r\n\r\n" + strings.Repeat("content", 1<<17)
	for _, tc := range []struct {
		name, path string
		body       io.Reader
		header     []string
	}{
		{"plain", dir + "/f", cut{bytes.NewReader(make([]byte, 700<<10))}, nil},
		{"plain, in new directories", dir + "/new/er/f", cut{bytes.NewReader(make([]byte, 1<<10))}, nil},
		{"gzip", dir + "/f", bytes.NewReader(zipped.Bytes()[:zipped.Len()-9]), []string{"Content-Encoding", "gzip"}},
		{"gzip with a wrong sum", dir + "/f", io.MultiReader(bytes.NewReader(zipped.Bytes()[:zipped.Len()-8]), strings.NewReader("12345678")), []string{"Content-Encoding", "gzip"}},
		{"multipart", dir + "/f", strings.NewReader(form), []string{"Content-Type", "multipart/form-data; boundary=b"}},
	} {
		if w := call(t, h.Upload, "POST", at(tc.path), tc.body, tc.header...); w.Code != 400 {
			t.Errorf("%s: got %d %s", tc.name, w.Code, w.Body)
		}
		left, _ := os.ReadDir(dir)
		if got, _ := os.ReadFile(dir + "/f"); string(got) != "old" || len(left) != 1 {
			t.Errorf("%s: the file has %d bytes, in the directory is %v", tc.name, len(got), left)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestAnUploadThatCannotFitIsRefusedBeforeItIsSent(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can mount")
	}
	h, dir := handler(), t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("cannot mount: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	server := httptest.NewServer(http.HandlerFunc(h.Upload))
	defer server.Close()
	for _, size := range []int64{4 << 20, 1 << 50} {
		body, never := io.Pipe() // nothing is ever sent
		r, err := http.NewRequestWithContext(t.Context(), "POST", server.URL+at(dir+"/a/b/f"), body)
		if err != nil {
			t.Fatal(err)
		}
		r.ContentLength = size
		resp, err := server.Client().Do(r)
		never.Close()
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 507 {
			t.Errorf("%d bytes: got %d", size, resp.StatusCode)
		}
	}
	os.WriteFile(dir+"/part1", make([]byte, 400<<10), 0o644)
	os.WriteFile(dir+"/part2", make([]byte, 400<<10), 0o644)
	request, _ := json.Marshal(map[string]any{"source_paths": []string{dir + "/part1", dir + "/part2"}, "destination": dir + "/x/y/all"})
	if w := call(t, h.Compose, "POST", "/files/compose", bytes.NewReader(request)); w.Code != 507 {
		t.Errorf("compose: got %d %s", w.Code, w.Body)
	}
	if left, _ := filepath.Glob(dir + "/*"); fmt.Sprint(left) != fmt.Sprint([]string{dir + "/part1", dir + "/part2"}) {
		t.Errorf("left: %v", left)
	}
}

func TestOfUploadsToOnePathOneIsThereInTheEnd(t *testing.T) {
	h, dir := handler(), t.TempDir()
	var uploads sync.WaitGroup
	for i := range 16 {
		uploads.Go(func() {
			content := bytes.Repeat([]byte{byte('a' + i)}, 300<<10)
			if w := call(t, h.Upload, "POST", at(dir+"/f"), bytes.NewReader(content)); w.Code != 200 {
				t.Errorf("got %d %s", w.Code, w.Body)
			}
		})
	}
	uploads.Wait()
	got, err := os.ReadFile(dir + "/f")
	if err != nil || len(got) != 300<<10 || bytes.Count(got, got[:1]) != len(got) {
		t.Errorf("%d bytes of several uploads, %v", len(got), err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

func TestUploadsThroughLinksMeanWhatTheKernelMeans(t *testing.T) {
	h, dir := handler(), t.TempDir()
	os.MkdirAll(dir+"/real/sub", 0o755)
	os.Symlink("real/sub", dir+"/l")
	os.Symlink("../target", dir+"/real/sub/up") // by way of l this is real/target too
	os.Symlink("loop", dir+"/loop")
	if w := call(t, h.Upload, "POST", at(dir+"/l/up"), strings.NewReader("x")); w.Code != 200 {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
	if got, err := os.ReadFile(dir + "/real/target"); string(got) != "x" {
		t.Errorf("got %q, %v", got, err)
	}
	if w := call(t, h.Upload, "POST", at(dir+"/loop"), strings.NewReader("x")); w.Code != 400 {
		t.Errorf("a link to itself: got %d %s", w.Code, w.Body)
	}
}

func FuzzDownloadHeaders(f *testing.F) {
	f.Add("bytes=0-1,3-", `"x"`, "gzip;q=0.1, *")
	f.Add("bytes=-9223372036854775808", "*", "identity;q=0")
	path := f.TempDir() + "/f"
	os.WriteFile(path, []byte("0123456789"), 0o644)
	f.Fuzz(func(t *testing.T, ranges, tag, accept string) {
		w := call(t, handler().Download, "GET", at(path), nil, "Range", ranges, "If-Range", tag, "If-None-Match", tag, "Accept-Encoding", accept)
		switch w.Code {
		case 200, 206, 304, 406, 412, 416:
		default:
			t.Errorf("got %d %s", w.Code, w.Body)
		}
		if w.Code == 200 && w.Header().Get("Content-Encoding") == "" && w.Body.String() != "0123456789" {
			t.Errorf("got %q", w.Body)
		}
	})
}

func FuzzMetadataHeaders(f *testing.F) {
	f.Add("X-Metadata-Key", "value")
	f.Add("X-Metadata-", "")
	f.Add("X-Metadata-\xff", strings.Repeat("v", 5000))
	f.Fuzz(func(t *testing.T, name, value string) {
		meta, err := filemeta.FromHeader(http.Header{name: {value}})
		for key, got := range meta {
			if err != nil || got != value || len(key) == 0 || len(key) > 246 || len(got) > 4096 {
				t.Errorf("%q: %q gave %q: %q, %v", name, value, key, got, err)
			}
		}
	})
}

// Whatever is in the body, the file is complete or not there. All parts go to
// one path: what they call themselves is for other tests.
func FuzzMultipartUpload(f *testing.F) {
	f.Add([]byte("--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"x\"\r\n\r\ncontent\r\n--b--\r\n"), "multipart/form-data; boundary=b")
	f.Add([]byte("--b\r\n\r\n\r\n--b\r\n"), "multipart/form-data; boundary=\"b\"")
	f.Add([]byte("\x1f\x8b"), "multipart/form-data; boundary=")
	f.Fuzz(func(t *testing.T, body []byte, contentType string) {
		dir := t.TempDir()
		w := call(t, handler().Upload, "POST", at(dir+"/f"), bytes.NewReader(body), "Content-Type", contentType)
		if w.Code != 200 && w.Code != 400 {
			t.Errorf("got %d %s", w.Code, w.Body)
		}
		left, _ := os.ReadDir(dir)
		for _, e := range left {
			if e.Name() != "f" {
				t.Errorf("left: %s", e.Name())
			}
		}
	})
}

func FuzzComposeBody(f *testing.F) {
	f.Add([]byte(`{"source_paths":["/nowhere/a"],"destination":"/nowhere/b"}`))
	f.Add([]byte(`{"source_paths":[],"destination":1}`))
	f.Add([]byte(`{"source_paths":["\u0000"],"destination":"~x","username":"root"}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		req, err := parseCompose(bytes.NewReader(body)) // and no further: the paths are the input's
		if err != nil {
			if statusOf(err) != 400 {
				t.Errorf("got %v", err)
			}
			return
		}
		if len(req.SourcePaths) == 0 || req.Destination == "" {
			t.Errorf("%q was taken for a request", body)
		}
		u := user.User{Home: "/home/u"}
		for _, path := range append(req.SourcePaths, req.Destination) {
			if got, err := handler().resolve(path, u); err == nil && !filepath.IsAbs(got) || err != nil && statusOf(err) != 400 {
				t.Errorf("%q: got %q, %v", path, got, err)
			}
		}
	})
}
