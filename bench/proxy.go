package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"
)

// ProxyOptions say what Proxy measures and how long it takes.
type ProxyOptions struct {
	Serve  []string      // command that calls ServeProxy
	Round  time.Duration // of one measurement
	Rounds int           // of each combination of body, connections and target
	Idle   int           // WebSockets held at once
}

// proxyBench is one run of Proxy and what it holds.
type proxyBench struct {
	ProxyOptions
	dir      string
	upstream string       // address of nginx, which serves two files
	nginx    string       // address of nginx before it, as a reverse proxy
	proxy    *servedProxy // the data plane before it
	results  []Result
}

// proxyBody is one of the two files.
type proxyBody struct {
	path, name string
	size       int64
}

var proxyBodies = []proxyBody{
	{"/1k", "1 KiB", 1 << 10},
	{"/1m", "1 MiB", 1 << 20},
}

// Proxy measures the data plane's front, listeners and all, as one hop before a
// file server on the loopback interface, beside Debian's nginx as the reverse proxy
// before the same server. Proxies, server and client share the machine, so what is
// compared is what a request costs altogether.
func Proxy(ctx context.Context, o ProxyOptions) (_ Report, err error) {
	r := Report{Bench: "proxy", Host: thisHost("none")}
	b := &proxyBench{ProxyOptions: o}
	if b.dir, err = os.MkdirTemp("", "wrenn-bench-"); err != nil {
		return r, fmt.Errorf("make directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if err := b.writeFiles(); err != nil {
		return r, err
	}
	upstream, err := startNginx(ctx, b.dir, "upstream", "worker_processes 1;", func(address string) string {
		return fmt.Sprintf("access_log off; server { listen %s backlog=4096; root %s; }", address, filepath.Join(b.dir, "files"))
	})
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, upstream.stop()) }()
	b.upstream = upstream.address
	proxy, err := startNginx(ctx, b.dir, "proxy", "worker_processes auto;", func(address string) string {
		return fmt.Sprintf(`upstream guest { server %s; keepalive 64; }
	access_log %s/access.log;
	server { listen %s backlog=4096; location / { proxy_pass http://guest; proxy_http_version 1.1;
		proxy_set_header Connection ""; proxy_set_header Host $http_host;
		proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header X-Forwarded-Host $http_host;
		proxy_set_header X-Forwarded-Proto $scheme; } }`, b.upstream, b.dir, address)
	})
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, proxy.stop()) }()
	b.nginx = proxy.address
	if b.proxy, err = startServedProxy(ctx, o.Serve, b.dir); err != nil {
		return r, err
	}
	defer func() {
		_, ended := b.proxy.stop()
		err = errors.Join(err, ended)
	}()
	for _, body := range proxyBodies {
		for _, conns := range []int{1, 16, 64} {
			progress("proxy: %s over %d connections", body.name, conns)
			if err := b.measure(ctx, body, conns); err != nil {
				return r, fmt.Errorf("measure %s over %d connections: %w", body.name, conns, err)
			}
		}
	}
	progress("proxy: %d idle WebSockets", b.Idle)
	if err := b.measureIdle(ctx); err != nil {
		return r, fmt.Errorf("hold WebSockets: %w", err)
	}
	r.Results = b.results
	return r, nil
}

func (b *proxyBench) writeFiles() error {
	dir := filepath.Join(b.dir, "files")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, body := range proxyBodies {
		if err := os.WriteFile(filepath.Join(dir, body.path), make([]byte, body.size), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// measure compares the three ways to a file, in turn.
func (b *proxyBench) measure(ctx context.Context, body proxyBody, conns int) error {
	_, port, err := net.SplitHostPort(b.upstream)
	if err != nil {
		return err
	}
	targets := []struct{ address, host string }{
		{b.upstream, "upstream"},
		{b.nginx, "nginx"},
		{b.proxy.address, port + "-" + benchSandbox(0) + "." + benchDomain},
	}
	var rates, latencies [3]samples
	for round := range b.Rounds + 1 {
		for i := range targets {
			// Who comes first changes.
			i = (i + round) % len(targets)
			load := httpLoad{address: targets[i].address, host: targets[i].host, body: body, conns: conns}
			if round == 0 {
				load.length = b.Round / 4 // to warm up
			} else {
				load.length = b.Round
			}
			took, err := load.run(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", targets[i].host, err)
			}
			if round == 0 {
				continue
			}
			rates[i] = append(rates[i], float64(len(took))/load.length.Seconds())
			latencies[i] = append(latencies[i], took.quantile(.5))
		}
	}
	direct, nginx, ours := 0, 1, 2
	name := fmt.Sprintf("%s, %d connections", body.name, conns)
	rate := rates[ours].result(name, "requests/s").beside(rates[nginx]).noted("floor: nginx; without any proxy %.0f", rates[direct].quantile(.5))
	switch {
	case body.size == 1<<10 && conns == 16:
		rate = rate.atLeast(rates[nginx], .5)
	case body.size == 1<<20:
		for i := range rates {
			for j := range rates[i] {
				rates[i][j] *= float64(body.size) / mebibyte
			}
		}
		rate = rates[ours].result(name, "MiB/s").atLeast(rates[nginx], .8).
			noted("floor: nginx; without any proxy %.0f", rates[direct].quantile(.5))
	}
	b.results = append(b.results, rate)
	if body.size == 1<<10 {
		b.results = append(b.results, addedLatency(name, latencies[direct], latencies[nginx], latencies[ours], conns == 1))
	}
	return nil
}

// addedLatency is what a proxy adds to the median of the same round without one.
func addedLatency(name string, direct, nginx, ours samples, judged bool) Result {
	var added, floor samples
	for i := range ours {
		added = append(added, (ours[i]-direct[i])*1000)
		floor = append(floor, (nginx[i]-direct[i])*1000)
	}
	r := added.result("added latency, "+name, "µs").beside(floor).
		noted("over %.0f µs without any proxy; floor: what nginx adds", direct.quantile(.5)*1000)
	if judged {
		return r.against(floor, 1.5)
	}
	return r
}

func benchSandbox(n int) string { return fmt.Sprintf("bench%015d", n) }

const benchDomain = "bench.test"
