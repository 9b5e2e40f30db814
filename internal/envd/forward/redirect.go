package forward

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"strconv"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	tableName = "wrenn_forward"
	// preferredPort is where redirected connections arrive, next to the agent's.
	// Any other does, but one that is known can be avoided.
	preferredPort = 49984
)

// redirect exposes by rules that turn connections to the addresses to a port of
// the forwarder's own. It binds none of the sandbox's ports, so it is in
// nobody's way, and an address that is redirected a moment too long does no harm.
type redirect struct {
	loops     sync.WaitGroup
	listeners []*net.TCPListener
	port      uint16
	nft       *nftables.Conn
	table     *nftables.Table
	sets      [2]*nftables.Set // of IPv4 and IPv6
	exposed   map[netip.AddrPort]bool
	log       *slog.Logger
}

func newRedirect(ctx context.Context, serve server, log *slog.Logger) (*redirect, error) {
	r := &redirect{exposed: make(map[netip.AddrPort]bool), log: log}
	err := r.listen(ctx)
	if err == nil {
		err = r.install()
	}
	if err != nil {
		r.stop()
		return nil, err
	}
	for _, l := range r.listeners {
		r.loops.Go(func() {
			accept(ctx, l, func(c *net.TCPConn) {
				to, err := originalDestination(c)
				if err != nil || to.Port() == r.port { // it came here directly
					reset(c)
					return
				}
				serve(ctx, c, to, true)
			})
		})
	}
	return r, nil
}

// listen opens the port at which redirected connections arrive, for each family
// that there is.
func (r *redirect) listen(ctx context.Context) error {
	var config net.ListenConfig
	first, err := config.Listen(ctx, "tcp4", ":"+strconv.Itoa(preferredPort))
	if errors.Is(err, unix.EADDRINUSE) {
		first, err = config.Listen(ctx, "tcp4", ":0")
	}
	if err != nil {
		return fmt.Errorf("listen for redirected connections: %w", err)
	}
	r.listeners = append(r.listeners, first.(*net.TCPListener))
	r.port = uint16(first.Addr().(*net.TCPAddr).Port)
	second, err := config.Listen(ctx, "tcp6", ":"+strconv.Itoa(int(r.port)))
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listen for redirected IPv6 connections: %w", err)
	}
	r.listeners = append(r.listeners, second.(*net.TCPListener))
	return nil
}

// install makes the table anew, with nothing redirected yet.
func (r *redirect) install() error {
	nft, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	r.nft = nft
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: tableName}
	nft.AddTable(table) // so that there is one to delete
	nft.DelTable(table)
	nft.AddTable(table)
	chain := nft.AddChain(&nftables.Chain{
		Name: "prerouting", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest,
	})
	families := []struct {
		proto      byte
		name       string
		key        nftables.SetDatatype
		offset     uint32 // of the destination in the header
		size       uint32
		portSource uint32 // register behind the address's
	}{
		{unix.NFPROTO_IPV4, "ipv4", nftables.TypeIPAddr, 16, 4, unix.NFT_REG32_01},
		{unix.NFPROTO_IPV6, "ipv6", nftables.TypeIP6Addr, 24, 16, unix.NFT_REG_2},
	}
	for i, f := range families {
		set := &nftables.Set{
			Table: table, Name: f.name, Concatenation: true,
			KeyType: nftables.MustConcatSetType(f.key, nftables.TypeInetService),
		}
		if err := nft.AddSet(set, nil); err != nil {
			return fmt.Errorf("add set %s: %w", f.name, err)
		}
		r.sets[i] = set
		nft.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: unix.NFT_REG_1},
			&expr.Cmp{Register: unix.NFT_REG_1, Data: []byte{f.proto}},
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: unix.NFT_REG_1},
			&expr.Cmp{Register: unix.NFT_REG_1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Payload{DestRegister: unix.NFT_REG_1, Base: expr.PayloadBaseNetworkHeader, Offset: f.offset, Len: f.size},
			&expr.Payload{DestRegister: f.portSource, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: set.Name, SetID: set.ID},
			&expr.Immediate{Register: unix.NFT_REG_1, Data: binaryutil.BigEndian.PutUint16(r.port)},
			&expr.Redir{RegisterProtoMin: unix.NFT_REG_1, RegisterProtoMax: unix.NFT_REG_1, Flags: unix.NF_NAT_RANGE_PROTO_SPECIFIED},
		}})
	}
	if err := nft.Flush(); err != nil {
		return fmt.Errorf("install redirection: %w", err)
	}
	r.table = table
	return nil
}

func (r *redirect) expose(paths map[netip.AddrPort]netip.AddrPort) (done bool, err error) {
	want := make(map[netip.AddrPort]bool, len(paths))
	for at := range paths {
		want[netip.AddrPortFrom(at.Addr().WithZone(""), at.Port())] = true
	}
	if maps.Equal(want, r.exposed) {
		return true, nil
	}
	err = errors.Join(
		r.change(r.nft.SetDeleteElements, r.exposed, want),
		r.change(r.nft.SetAddElements, want, r.exposed),
		r.nft.Flush(),
	)
	if err == nil {
		r.exposed = want
		return true, nil
	}
	// Somebody took the table away, or changed it: put it back.
	r.exposed = make(map[netip.AddrPort]bool)
	return false, errors.Join(fmt.Errorf("change redirection: %w", err), r.install())
}

// change applies an operation to the elements that are in one set and not in the other.
func (r *redirect) change(apply func(*nftables.Set, []nftables.SetElement) error, in, notIn map[netip.AddrPort]bool) error {
	var elements [len(r.sets)][]nftables.SetElement
	for at := range in {
		if notIn[at] {
			continue
		}
		family := 0
		if at.Addr().Is6() {
			family = 1
		}
		elements[family] = append(elements[family], nftables.SetElement{Key: setKey(at)})
	}
	for i, set := range r.sets {
		if len(elements[i]) == 0 {
			continue
		}
		if err := apply(set, elements[i]); err != nil {
			return err
		}
	}
	return nil
}

// setKey is a key of an address and a port, each filled up to four bytes.
func setKey(at netip.AddrPort) []byte {
	key := at.Addr().AsSlice()
	key = binary.BigEndian.AppendUint16(key, at.Port())
	return append(key, 0, 0)
}

// own is empty: the forwarder's port is on all addresses, and no path leads there.
func (r *redirect) own() []netip.AddrPort { return nil }

func (r *redirect) stop() {
	for _, l := range r.listeners {
		l.Close()
	}
	r.loops.Wait()
}

func (r *redirect) close() {
	if r.table == nil {
		return
	}
	r.nft.DelTable(r.table)
	if err := r.nft.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		r.log.Warn("Cannot remove the redirection of ports", "error", err)
	}
}

// originalDestination tells where a redirected connection was meant to go.
func originalDestination(c *net.TCPConn) (netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	const soOriginalDst = 80 // for both families
	four := c.LocalAddr().(*net.TCPAddr).IP.To4() != nil
	var to netip.AddrPort
	var failed error
	err = raw.Control(func(fd uintptr) {
		// The answer is a socket address. The package has no call for this option,
		// but calls for others that are long enough and start with what is needed.
		if four { // struct sockaddr_in: family, port, address
			var raw *unix.IPv6Mreq
			if raw, failed = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, soOriginalDst); failed == nil {
				answer := raw.Multiaddr
				to = netip.AddrPortFrom(netip.AddrFrom4([4]byte(answer[4:8])), binary.BigEndian.Uint16(answer[2:4]))
			}
			return
		}
		var raw *unix.IPv6MTUInfo // starts with a struct sockaddr_in6
		if raw, failed = unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, soOriginalDst); failed == nil {
			port := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, raw.Addr.Port))
			to = netip.AddrPortFrom(netip.AddrFrom16(raw.Addr.Addr), port)
		}
	})
	return to, errors.Join(err, failed)
}
