package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/wrenn/wrenn/internal/accesslog"
)

// accessLogOff is the value of --access-log that means none.
const accessLogOff = "off"

// accessLogGrace is how long a disk may take for the last lines.
const accessLogGrace = 5 * time.Second

// openAccessLog opens the access log where the operator wants it. It ends after the
// server, whose last requests it has to take.
func (p *platform) openAccessLog() (err error) {
	path := p.opts.AccessLog
	switch path {
	case accessLogOff:
		return nil
	case "":
		path = p.dir.accessLog()
	}
	if p.access, err = accesslog.Open(path, p.log); err != nil {
		return fmt.Errorf("%w (choose another with --access-log, or none with --access-log off)", err)
	}
	p.onStop(func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, accessLogGrace)
		defer cancel()
		return p.access.Close(ctx)
	})
	return nil
}

// agentMetrics serves what the host agent counts, for one that is a process of its
// own.
func agentMetrics(a prometheus.Collector) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(a)
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4})
}

// metrics serves what the platform counts, in Prometheus' format.
func (p *platform) metrics() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), p.proxy)
	if p.agent != nil { // one of another process is not asked
		registry.MustRegister(p.agent)
	}
	if p.access != nil {
		registry.MustRegister(p.access)
	}
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog:      slog.NewLogLogger(p.log.Handler(), slog.LevelWarn),
		ErrorHandling: promhttp.ContinueOnError, // most of it is better than nothing
		// A scrape costs CPU time, and more than a few at once are a mistake.
		MaxRequestsInFlight: 4,
	})
}
