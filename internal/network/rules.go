package network

import (
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// A match is a part of a rule; a rule is matches and a verdict in a row.
type match []expr.Any

func addRule(c *nftables.Conn, chain *nftables.Chain, parts ...match) {
	var exprs []expr.Any
	for _, p := range parts {
		exprs = append(exprs, p...)
	}
	c.AddRule(&nftables.Rule{Table: chain.Table, Chain: chain, Exprs: exprs})
}

func hookedChain(c *nftables.Conn, t *nftables.Table, name string, typ nftables.ChainType,
	hook *nftables.ChainHook, prio *nftables.ChainPriority, policy nftables.ChainPolicy) *nftables.Chain {
	return c.AddChain(&nftables.Chain{Table: t, Name: name, Type: typ, Hooknum: hook, Priority: prio, Policy: &policy})
}

var (
	accept = match{&expr.Verdict{Kind: expr.VerdictAccept}}
	drop   = match{&expr.Verdict{Kind: expr.VerdictDrop}}

	tcp  = l4proto(unix.IPPROTO_TCP)
	udp  = l4proto(unix.IPPROTO_UDP)
	icmp = l4proto(unix.IPPROTO_ICMP)

	established = ctBits(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
	newFlow     = ctBits(expr.CtKeySTATE, expr.CtStateBitNEW)
	invalid     = ctBits(expr.CtKeySTATE, expr.CtStateBitINVALID)
	dnatted     = ctBits(expr.CtKeySTATUS, 1<<5) // IPS_DST_NAT

	original = direction(0) // packets of who opened the connection
	reply    = direction(1) // packets of who answers

	// noReturnRoute: the source address is not reached over the link that the
	// packet came in by, so it is not the slot's own.
	noReturnRoute = match{
		&expr.Fib{Register: 1, FlagSADDR: true, FlagIIF: true, ResultOIF: true},
		equal(binaryutil.NativeEndian.PutUint32(0)),
	}
	isIPv6      = match{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, equal([]byte{unix.NFPROTO_IPV6})}
	notRoot     = match{&expr.Meta{Key: expr.MetaKeySKUID, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)}}
	echoRequest = match{transport(0, 1), equal([]byte{8})}

	// noSYN: the packet does not begin a TCP connection.
	noSYN = match{
		transport(13, 1),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x17}, Xor: []byte{0}}, // FIN, SYN, RST, ACK
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0x02}},
	}

	resetTCP        = match{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}
	portUnreachable = match{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 3}}
	masquerade      = match{&expr.Masq{}}
)

func equal(data []byte) *expr.Cmp {
	return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data}
}

func fullName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func iif(name string) match {
	return match{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, equal(fullName(name))}
}

func oif(name string) match {
	return match{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, equal(fullName(name))}
}

func iifPrefix(prefix string) match {
	return match{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, equal([]byte(prefix))}
}

func oifPrefix(prefix string) match {
	return match{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, equal([]byte(prefix))}
}

func l4proto(proto byte) match {
	return match{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equal([]byte{proto})}
}

func transport(offset, length uint32) *expr.Payload {
	return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: length}
}

func ipHeader(offset uint32) *expr.Payload {
	return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4}
}

func dport(port uint16) match {
	return match{transport(2, 2), equal(binaryutil.BigEndian.PutUint16(port))}
}

// daddr matches an IPv4 destination; only where no IPv6 packet comes.
func daddr(p netip.Prefix) match {
	p = p.Masked()
	return match{
		ipHeader(16),
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: net.CIDRMask(p.Bits(), 32), Xor: make([]byte, 4),
		},
		equal(p.Addr().AsSlice()),
	}
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func saddrNot(a netip.Addr) match {
	return match{ipHeader(12), &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: a.AsSlice()}}
}

func ctBits(key expr.CtKey, bits uint32) match {
	return match{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// over matches when more than n connections have come by this rule and live on.
func over(n uint32) match {
	return match{&expr.Connlimit{Count: n, Flags: unix.NFT_LIMIT_F_INV}}
}

func direction(d byte) match {
	return match{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, equal([]byte{d})}
}

func jump(chain *nftables.Chain) match {
	return match{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain.Name}}
}

func dnat(to netip.Addr) match { return nat(expr.NATTypeDestNAT, to) }
func snat(to netip.Addr) match { return nat(expr.NATTypeSourceNAT, to) }

func nat(typ expr.NATType, to netip.Addr) match {
	return match{
		&expr.Immediate{Register: 1, Data: to.AsSlice()},
		&expr.NAT{Type: typ, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	}
}
