package tlscert

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"time"

	"github.com/libdns/libdns"
	"github.com/miekg/dns"
)

const (
	dnsTimeout = 20 * time.Second
	tsigFudge  = 300 // seconds by which clocks may differ; what RFC 8945 recommends
)

// rfc2136 updates zones as RFC 2136 says, which BIND, Knot, PowerDNS and many
// others take, signed with a shared key (TSIG, RFC 8945).
type rfc2136 struct {
	server    string // host:port
	keyName   string // with the root's dot; empty: unsigned
	algorithm string // with the root's dot
	secret    string // base64
}

func newRFC2136() (DNSProvider, error) {
	values := make(map[string]string)
	for _, name := range []string{"RFC2136_NAMESERVER", "RFC2136_TSIG_KEY", "RFC2136_TSIG_ALGORITHM", "RFC2136_TSIG_SECRET"} {
		value, err := setting(name)
		if err != nil {
			return nil, err
		}
		values[name] = value
	}
	p := rfc2136{server: values["RFC2136_NAMESERVER"], algorithm: dns.HmacSHA256, secret: values["RFC2136_TSIG_SECRET"]}
	if p.server == "" {
		return nil, errors.New("set RFC2136_NAMESERVER to the address of the zone's primary server, HOST or HOST:PORT")
	}
	p.server = withPort(p.server, "53")
	key := values["RFC2136_TSIG_KEY"]
	if (key == "") != (p.secret == "") {
		return nil, errors.New("RFC2136_TSIG_KEY and RFC2136_TSIG_SECRET go together: the key's name, and its secret in base64")
	}
	if key == "" {
		return p, nil
	}
	p.keyName = dns.CanonicalName(key)
	if _, err := base64.StdEncoding.DecodeString(p.secret); err != nil {
		return nil, fmt.Errorf("RFC2136_TSIG_SECRET is not base64: %w", err)
	}
	if a := values["RFC2136_TSIG_ALGORITHM"]; a != "" {
		p.algorithm = dns.CanonicalName(a)
	}
	switch p.algorithm {
	case dns.HmacSHA224, dns.HmacSHA256, dns.HmacSHA384, dns.HmacSHA512:
		return p, nil
	}
	return nil, fmt.Errorf("RFC2136_TSIG_ALGORITHM: no %q: want hmac-sha224, hmac-sha256, hmac-sha384 or hmac-sha512", values["RFC2136_TSIG_ALGORITHM"])
}

// AppendRecords implements libdns.RecordAppender, for TXT records.
func (p rfc2136) AppendRecords(ctx context.Context, zone string, records []libdns.Record) ([]libdns.Record, error) {
	return p.update(ctx, zone, records, (*dns.Msg).Insert)
}

// DeleteRecords implements libdns.RecordDeleter, for TXT records.
func (p rfc2136) DeleteRecords(ctx context.Context, zone string, records []libdns.Record) ([]libdns.Record, error) {
	return p.update(ctx, zone, records, (*dns.Msg).Remove)
}

func (p rfc2136) update(ctx context.Context, zone string, records []libdns.Record, change func(*dns.Msg, []dns.RR)) ([]libdns.Record, error) {
	zone = dns.Fqdn(zone)
	update := new(dns.Msg)
	update.SetUpdate(zone)
	var changed []libdns.Record
	for _, record := range records {
		r := record.RR()
		if r.Type != "TXT" {
			return nil, fmt.Errorf("cannot change %s records", r.Type)
		}
		change(update, []dns.RR{&dns.TXT{
			Hdr: dns.RR_Header{
				Name: dns.Fqdn(libdns.AbsoluteName(r.Name, zone)), Rrtype: dns.TypeTXT,
				Class: dns.ClassINET, Ttl: uint32(r.TTL / time.Second),
			},
			Txt: []string{r.Data},
		}})
		changed = append(changed, libdns.TXT{Name: r.Name, TTL: r.TTL, Text: r.Data})
	}
	client := &dns.Client{Net: "tcp", Timeout: dnsTimeout}
	if p.keyName != "" {
		update.SetTsig(p.keyName, p.algorithm, tsigFudge, time.Now().Unix())
		client.TsigSecret = map[string]string{p.keyName: p.secret}
	}
	answer, _, err := client.ExchangeContext(ctx, update, p.server)
	if err != nil {
		return nil, fmt.Errorf("update zone %s on %s: %w", zone, p.server, err)
	}
	if answer.Rcode != dns.RcodeSuccess {
		return nil, fmt.Errorf("update zone %s: %s answers %s: may the key %q change it there?", zone, p.server, dns.RcodeToString[answer.Rcode], p.keyName)
	}
	return changed, nil
}
