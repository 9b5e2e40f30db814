package agent

import (
	"github.com/prometheus/client_golang/prometheus"
)

// poolCounts is what is told of the pool on /metrics.
type poolCounts struct {
	hits, misses prometheus.Counter
	starts       *prometheus.CounterVec
}

func newPoolCounts() poolCounts {
	return poolCounts{
		hits: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "wrenn_pool_hits_total", Help: "Sandboxes that got an instance which was waiting for them.",
		}),
		misses: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "wrenn_pool_misses_total", Help: "Sandboxes that could have had a waiting instance, and there was none.",
		}),
		starts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wrenn_sandbox_starts_total", Help: "Sandboxes started, by what from: pool, image (the template's memory image), boot, snapshot.",
		}, []string{"from"}),
	}
}

func (p *pool) started(from string) { p.counts.starts.WithLabelValues(from).Inc() }

var (
	poolReady  = prometheus.NewDesc("wrenn_pool_ready", "Instances that wait.", []string{"build"}, nil)
	poolWant   = prometheus.NewDesc("wrenn_pool_wanted", "Instances that are to wait, by recent demand.", []string{"build"}, nil)
	poolMemory = prometheus.NewDesc("wrenn_pool_memory_bytes", "Memory that waiting instances take.", nil, nil)
	poolBudget = prometheus.NewDesc("wrenn_pool_memory_budget_bytes", "Memory that waiting instances may take.", nil, nil)
)

// Describe implements prometheus.Collector.
func (a *Agent) Describe(ch chan<- *prometheus.Desc) {
	c := a.pool.counts
	c.hits.Describe(ch)
	c.misses.Describe(ch)
	c.starts.Describe(ch)
	for _, d := range []*prometheus.Desc{poolReady, poolWant, poolMemory, poolBudget} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (a *Agent) Collect(ch chan<- prometheus.Metric) {
	c := a.pool.counts
	c.hits.Collect(ch)
	c.misses.Collect(ch)
	c.starts.Collect(ch)
	ready, want, memory := a.pool.level()
	for build, n := range ready {
		ch <- prometheus.MustNewConstMetric(poolReady, prometheus.GaugeValue, float64(n), build)
		ch <- prometheus.MustNewConstMetric(poolWant, prometheus.GaugeValue, float64(want[build]), build)
	}
	ch <- prometheus.MustNewConstMetric(poolMemory, prometheus.GaugeValue, float64(memory))
	ch <- prometheus.MustNewConstMetric(poolBudget, prometheus.GaugeValue, float64(a.pool.budget))
}
