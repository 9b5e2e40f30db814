package forward

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	tableName = "wrenn_forward"
	// maxElements of one change: a message has room for 2000.
	maxElements = 500
)

// nftRules redirects by a table of nf_tables.
type nftRules struct {
	conn  *nftables.Conn
	port  uint16
	table *nftables.Table
	sets  [2]*nftables.Set // of IPv4 and IPv6
	now   map[netip.AddrPort]bool
	log   *slog.Logger
}

// newNFT installs a table that redirects nothing yet.
func newNFT(port uint16, log *slog.Logger) (*nftRules, error) {
	r := &nftRules{port: port, log: log}
	if err := r.install(); err != nil {
		return nil, err
	}
	return r, nil
}

// install makes the table anew, with nothing redirected yet.
func (r *nftRules) install() error {
	nft, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	r.conn = nft
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
	r.table, r.now = table, make(map[netip.AddrPort]bool)
	return nil
}

func (r *nftRules) set(want map[netip.AddrPort]bool) error {
	if maps.Equal(want, r.now) {
		if _, err := r.conn.ListTableOfFamily(tableName, nftables.TableFamilyINet); !errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err := r.install(); err != nil {
			return err
		}
	}
	err := errors.Join(
		r.change(r.conn.SetDeleteElements, r.now, want),
		r.change(r.conn.SetAddElements, want, r.now),
	)
	if err != nil { // somebody took the table away, or changed it: put it back
		return errors.Join(fmt.Errorf("change redirection: %w", err), r.install())
	}
	r.now = want
	return nil
}

// intact is true: nothing but a program takes the table away, which is too seldom
// to be asked for with each look. set finds out.
func (r *nftRules) intact() bool { return true }

// change applies an operation to the elements that are in one set and not in the other.
func (r *nftRules) change(apply func(*nftables.Set, []nftables.SetElement) error, in, notIn map[netip.AddrPort]bool) error {
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
		for some := range slices.Chunk(elements[i], maxElements) {
			if err := errors.Join(apply(set, some), r.conn.Flush()); err != nil {
				return err
			}
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

func (r *nftRules) close() {
	r.conn.DelTable(r.table)
	if err := r.conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		r.log.Warn("Cannot remove the redirection of ports", "error", err)
	}
}
