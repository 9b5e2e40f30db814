package proxy

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
)

// descriptions are the metrics that a usage becomes.
type descriptions struct {
	requests, open, sent, received, dialFailures, answers *prometheus.Desc
}

func describe(prefix, of string, labels ...string) descriptions {
	desc := func(name, help string, more ...string) *prometheus.Desc {
		return prometheus.NewDesc(prefix+name, help+" ("+of+").", append(more, labels...), nil)
	}
	return descriptions{
		requests:     desc("requests_total", "Requests that have ended, by class of status, or broken off, or refused for the sandbox's limit", "code"),
		open:         desc("open_streams", "Requests and upgraded connections under way"),
		sent:         desc("sent_bytes_total", "Bytes of bodies and of upgraded connections that went to clients"),
		received:     desc("received_bytes_total", "Bytes of bodies and of upgraded connections that came from clients"),
		dialFailures: desc("dial_failures_total", "Requests for which no connection to the port could be made"),
		answers:      desc("answer_seconds", "Time from a request to the header of the application's answer"),
	}
}

var (
	ofPort = describe("wrenn_proxy_", "by sandbox and port", "sandbox", "port")
	ofAll  = describe("wrenn_proxy_all_", "of all sandboxes, those that are gone included")
)

// Describe implements prometheus.Collector.
func (p *Proxy) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []descriptions{ofPort, ofAll} {
		for _, desc := range []*prometheus.Desc{d.requests, d.open, d.sent, d.received, d.dialFailures, d.answers} {
			to <- desc
		}
	}
}

// Collect implements prometheus.Collector.
func (p *Proxy) Collect(to chan<- prometheus.Metric) {
	ofAll.collect(to, &p.ledger.all)
	for _, e := range p.ledger.entries() {
		ofPort.collect(to, e.usage, e.sandbox, e.port)
	}
}

// ledgerEntry is the usage of a port with its labels.
type ledgerEntry struct {
	sandbox, port string
	usage         *usage
}

// entries lists what there is, so that nothing is locked while it is sent on: the
// reader may be slow.
func (l *ledger) entries() []ledgerEntry {
	l.mu.RLock()
	defer l.mu.RUnlock()
	var all []ledgerEntry
	for id, a := range l.accounts {
		for port, u := range a.ports {
			e := ledgerEntry{sandbox: id, port: "other", usage: u}
			if port != otherPorts {
				e.port = strconv.Itoa(int(port))
			}
			all = append(all, e)
		}
	}
	return all
}

func (d descriptions) collect(to chan<- prometheus.Metric, u *usage, labels ...string) {
	counter := func(desc *prometheus.Desc, n int64, labels ...string) {
		to <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(n), labels...)
	}
	for i := range u.requests {
		// Most ports have two or three kinds: the others would be series for nothing.
		if n := u.requests[i].Load(); n > 0 || len(labels) == 0 {
			counter(d.requests, n, append([]string{outcomeNames[i]}, labels...)...)
		}
	}
	to <- prometheus.MustNewConstMetric(d.open, prometheus.GaugeValue, float64(u.open.Load()), labels...)
	counter(d.sent, u.sent.Load(), labels...)
	counter(d.received, u.received.Load(), labels...)
	counter(d.dialFailures, u.dialFailures.Load(), labels...)
	d.collectAnswers(to, &u.answers, labels)
}

func (d descriptions) collectAnswers(to chan<- prometheus.Metric, h *histogram, labels []string) {
	var count uint64
	buckets := make(map[float64]uint64, len(answerBounds))
	for i := range h.buckets {
		count += uint64(h.buckets[i].Load())
		if i < len(answerBounds) {
			buckets[answerBounds[i].Seconds()] = count
		}
	}
	to <- prometheus.MustNewConstHistogram(d.answers, count, float64(h.nanos.Load())/1e9, buckets, labels...)
}
