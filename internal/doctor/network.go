package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"syscall"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// network tries in a network namespace of its own, which vanishes afterwards,
// what a sandbox's network needs: a pair of links and address translation.
func network(ctx context.Context) Result {
	const name = "network"
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the runtime ends the thread with the goroutine, and the
		// namespace goes with it.
		runtime.LockOSThread()
		done <- tryNetwork()
	}()
	select {
	case err := <-done:
		if err != nil {
			return fail(name, "load the modules veth, nf_tables, nft_chain_nat, nft_masq and nft_connlimit (modprobe), or run on a host that allows them", "%v", err)
		}
		return ok(name, "network namespaces, links and address translation work")
	case <-ctx.Done():
		return fail(name, "run doctor again", "interrupted: %v", ctx.Err())
	}
}

func tryNetwork() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("cannot make a network namespace: %w", err)
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "doctor0"}, PeerName: "doctor1"}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("cannot make a veth pair: %w", err)
	}
	nft, err := nftables.New()
	if err != nil {
		return fmt.Errorf("cannot open an nftables socket: %w", err)
	}
	table := nft.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "doctor"})
	chain := nft.AddChain(&nftables.Chain{
		Name: "nat", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	})
	nft.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Connlimit{Count: 1}, &expr.Masq{}}})
	if err := nft.Flush(); err != nil {
		return fmt.Errorf("nftables refuses address translation or the counting of connections: %w", err)
	}
	return nil
}

func (h host) forwarding() Result {
	const name = "packet forwarding"
	if h.read("proc/sys/net/ipv4/ip_forward") != "1" {
		return warn(name, "nothing, or sysctl -w net.ipv4.ip_forward=1", "net.ipv4.ip_forward is off; the platform turns it on when it starts")
	}
	return ok(name, "on")
}

func (h host) resolver() Result {
	const name = "resolver"
	var loopback []string
	// systemd-resolved shows programs a loopback address in the first file and
	// keeps the real ones in the second.
	for _, file := range []string{"etc/resolv.conf", "run/systemd/resolve/resolv.conf"} {
		for line := range strings.Lines(h.read(file)) {
			fields := strings.Fields(line)
			if len(fields) < 2 || fields[0] != "nameserver" {
				continue
			}
			addr, err := netip.ParseAddr(fields[1])
			if err != nil || !addr.Is4() {
				continue
			}
			if !addr.IsLoopback() {
				return ok(name, "%s (from /%s)", addr, file)
			}
			loopback = append(loopback, addr.String())
		}
	}
	const remedy = "name a DNS server that is not on this host's loopback: wrenn up --resolver ADDRESS"
	if len(loopback) > 0 {
		return warn(name, remedy, "the only resolver is %s, which sandboxes cannot reach: they will resolve no names", strings.Join(loopback, ", "))
	}
	return warn(name, remedy, "/etc/resolv.conf names no IPv4 resolver: sandboxes will resolve no names")
}

func port(ctx context.Context, listen string, running bool) Result {
	const name = "listen address"
	if running {
		return ok(name, "%s; the platform is running", listen)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", listen)
	if err != nil {
		remedy := "choose another with --listen"
		if errors.Is(err, syscall.EADDRINUSE) {
			remedy = "stop the program that uses it (ss -ltnp shows which), or " + remedy
		}
		return fail(name, remedy, "%v", err)
	}
	l.Close()
	return ok(name, "%s is free", listen)
}
