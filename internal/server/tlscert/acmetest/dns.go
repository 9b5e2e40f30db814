package acmetest

import (
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
)

// The key with which updates of a Zone are signed.
const (
	KeyName   = "wrenn-key."
	KeySecret = "d3Jlbm4gd3Jlbm4gd3Jlbm4gd3Jlbm4gd3Jlbm4hISE=" // base64
)

// Zone is a DNS server for one zone. Every name in it is at 127.0.0.1; TXT records
// are made and removed by updates (RFC 2136) that are signed with its key.
type Zone struct {
	Name string // with the root's dot
	Addr string // host:port, UDP and TCP

	mu      sync.Mutex
	txt     map[string][]string // by name
	updates int
}

// NewZone serves a zone until the test ends.
func NewZone(t testing.TB, name string) *Zone {
	t.Helper()
	z := &Zone{Name: dns.Fqdn(name), txt: make(map[string][]string)}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	z.Addr = tcp.Addr().String()
	udp, err := net.ListenPacket("udp", z.Addr)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*dns.Server{{Listener: tcp}, {PacketConn: udp}} {
		up := make(chan struct{})
		s.Handler, s.TsigSecret = z, map[string]string{KeyName: KeySecret}
		s.NotifyStartedFunc = func() { close(up) }
		// The library refuses updates unless told otherwise.
		s.MsgAcceptFunc = func(h dns.Header) dns.MsgAcceptAction {
			if opcode := int(h.Bits>>11) & 0xf; opcode == dns.OpcodeUpdate {
				return dns.MsgAccept
			}
			return dns.DefaultMsgAcceptFunc(h)
		}
		var serving sync.WaitGroup
		serving.Go(func() { s.ActivateAndServe() })
		<-up
		t.Cleanup(func() { s.Shutdown(); serving.Wait() })
	}
	return z
}

// TXT returns the texts of all records at and below name.
func (z *Zone) TXT(name string) (texts []string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	for n, t := range z.txt {
		if dns.IsSubDomain(dns.Fqdn(name), n) {
			texts = append(texts, t...)
		}
	}
	return texts
}

// Updates is how many updates were taken.
func (z *Zone) Updates() int {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.updates
}

// ServeDNS implements dns.Handler.
func (z *Zone) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	answer := new(dns.Msg)
	answer.SetReply(r)
	answer.Authoritative = true
	switch {
	case len(r.Question) != 1 || !dns.IsSubDomain(z.Name, strings.ToLower(r.Question[0].Name)):
		answer.Rcode = dns.RcodeRefused
	case r.Opcode != dns.OpcodeUpdate:
		z.query(r.Question[0], answer)
	case r.IsTsig() == nil || w.TsigStatus() != nil:
		answer.Rcode = dns.RcodeNotAuth
	default:
		z.update(r.Ns)
		tsig := r.IsTsig()
		answer.SetTsig(tsig.Hdr.Name, tsig.Algorithm, tsig.Fudge, int64(tsig.TimeSigned))
	}
	w.WriteMsg(answer)
}

func (z *Zone) query(q dns.Question, answer *dns.Msg) {
	name := strings.ToLower(q.Name)
	header := func(rtype uint16) dns.RR_Header {
		return dns.RR_Header{Name: q.Name, Rrtype: rtype, Class: dns.ClassINET}
	}
	switch q.Qtype {
	case dns.TypeA:
		answer.Answer = []dns.RR{&dns.A{Hdr: header(dns.TypeA), A: net.IPv4(127, 0, 0, 1)}}
	case dns.TypeSOA:
		if name == z.Name {
			answer.Answer = []dns.RR{&dns.SOA{Hdr: header(dns.TypeSOA), Ns: "ns." + z.Name, Mbox: "admin." + z.Name}}
		}
	case dns.TypeTXT:
		z.mu.Lock()
		defer z.mu.Unlock()
		for _, text := range z.txt[name] {
			answer.Answer = append(answer.Answer, &dns.TXT{Hdr: header(dns.TypeTXT), Txt: []string{text}})
		}
	}
}

// update does what the update section says (RFC 2136, 2.5): class IN adds a
// record, class NONE removes it.
func (z *Zone) update(records []dns.RR) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.updates++
	for _, r := range records {
		txt, ok := r.(*dns.TXT)
		if !ok {
			continue
		}
		name, text := strings.ToLower(txt.Hdr.Name), strings.Join(txt.Txt, "")
		var kept []string
		for _, t := range z.txt[name] {
			if t != text {
				kept = append(kept, t)
			}
		}
		if txt.Hdr.Class == dns.ClassINET {
			kept = append(kept, text)
		}
		z.txt[name] = kept
	}
}
