package accesslog

import "github.com/prometheus/client_golang/prometheus"

var (
	descWritten = prometheus.NewDesc("wrenn_access_log_lines_total", "Lines written to the access log.", nil, nil)
	descDropped = prometheus.NewDesc("wrenn_access_log_dropped_lines_total",
		"Lines that did not get into the access log because the disk was too slow or full.", nil, nil)
)

// Describe implements prometheus.Collector.
func (l *Log) Describe(to chan<- *prometheus.Desc) {
	to <- descWritten
	to <- descDropped
}

// Collect implements prometheus.Collector.
func (l *Log) Collect(to chan<- prometheus.Metric) {
	l.mu.Lock()
	written, dropped := l.written, l.dropped
	l.mu.Unlock()
	to <- prometheus.MustNewConstMetric(descWritten, prometheus.CounterValue, float64(written))
	to <- prometheus.MustNewConstMetric(descDropped, prometheus.CounterValue, float64(dropped))
}
