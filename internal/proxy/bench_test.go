package proxy_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"testing"
)

// BenchmarkRequest compares a request through the proxy with the same one sent
// to the guest directly.
func BenchmarkRequest(b *testing.B) {
	for _, size := range []int{1 << 10, 1 << 20} {
		body := bytes.Repeat([]byte("x"), size)
		w := newWorld(b)
		port := guest(b, func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header().Set("Content-Length", fmt.Sprint(len(body)))
			rw.Write(body)
		})
		w.http1.Transport.(*http.Transport).MaxIdleConnsPerHost = 64
		for name, url := range map[string]string{"direct": fmt.Sprintf("http://127.0.0.1:%d", port), "proxy": w.url} {
			b.Run(fmt.Sprintf("%dKiB/%s", size>>10, name), func(b *testing.B) {
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					req, err := http.NewRequest("GET", url, nil)
					if err != nil {
						b.Fatal(err)
					}
					req.Host = fmt.Sprintf("%d-%s.wrenn.test", port, idA)
					res, err := w.http1.Do(req)
					if err != nil {
						b.Fatal(err)
					}
					n, err := io.Copy(io.Discard, res.Body)
					res.Body.Close()
					if err != nil || n != int64(size) {
						b.Fatal(n, err)
					}
				}
			})
		}
	}
}
