package network

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// installHostTable puts the host's table in place of the one an earlier process
// left, in one transaction: running sandboxes are never without it.
func installHostTable(cfg Config) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: tableName(cfg.Tag)}
	c.AddTable(table) // so that there is one to delete
	c.DelTable(table)
	t := c.AddTable(table)
	fromSlot, toSlot := iifPrefix(linkPrefix(cfg.Tag)), oifPrefix(linkPrefix(cfg.Tag))

	spoof := hookedChain(c, t, "spoof", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, nftables.ChainPolicyAccept)
	addRule(c, spoof, fromSlot, isIPv6, drop) // and every rule below sees IPv4 only
	addRule(c, spoof, fromSlot, noReturnRoute, drop)

	in := hookedChain(c, t, "input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
	addRule(c, in, fromSlot, established, accept)
	allowResolver(c, in, cfg.Resolver, fromSlot) // the host itself may be the resolver
	addRule(c, in, fromSlot, drop)

	egress := c.AddChain(&nftables.Chain{Table: t, Name: "egress"})
	allowResolver(c, egress, cfg.Resolver, nil)
	for _, p := range cfg.Allow {
		addRule(c, egress, daddr(p), accept)
	}
	for _, p := range cfg.Deny {
		if p.Addr().Is4() {
			addRule(c, egress, daddr(p), drop)
		}
	}

	fwd := hookedChain(c, t, "forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
	addRule(c, fwd, fromSlot, toSlot, drop)
	// No short cut for open connections: a range denied at a restart is closed to them too.
	addRule(c, fwd, fromSlot, jump(egress))
	addRule(c, fwd, toSlot, established, accept)
	addRule(c, fwd, toSlot, drop)

	post := hookedChain(c, t, "postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept)
	addRule(c, post, fromSlot, masquerade)

	if err := c.Flush(); err != nil {
		return fmt.Errorf("install nftables table %s: %w", table.Name, err)
	}
	return nil
}

func allowResolver(c *nftables.Conn, chain *nftables.Chain, resolver netip.Addr, from match) {
	if !resolver.IsValid() {
		return
	}
	for _, proto := range []match{tcp, udp} {
		addRule(c, chain, from, daddr(host(resolver)), proto, dport(53), accept)
	}
}

// removeHostTable is idempotent.
func removeHostTable(tag string) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	c.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: tableName(tag)})
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove nftables table %s: %w", tableName(tag), err)
	}
	return nil
}

func hasHostTable(tag string) (bool, error) {
	c, err := nftables.New()
	if err != nil {
		return false, err
	}
	_, err = c.ListTableOfFamily(tableName(tag), nftables.TableFamilyINet)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for nftables table %s: %w", tableName(tag), err)
	}
	return true, nil
}

// warnOfForwardDrop looks for what would keep sandboxes off the internet
// whatever our table says.
func warnOfForwardDrop(tag string, log *slog.Logger) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	chains, err := c.ListChains()
	if err != nil {
		return fmt.Errorf("list nftables chains: %w", err)
	}
	for _, ch := range chains {
		f := ch.Table.Family
		if ch.Type != nftables.ChainTypeFilter || ch.Hooknum == nil || *ch.Hooknum != *nftables.ChainHookForward ||
			ch.Policy == nil || *ch.Policy != nftables.ChainPolicyDrop ||
			(f != nftables.TableFamilyIPv4 && f != nftables.TableFamilyINet) {
			continue
		}
		log.Warn("another firewall drops forwarded packets unless told otherwise; sandboxes may have no internet",
			"table", ch.Table.Name, "chain", ch.Name,
			"remedy", fmt.Sprintf("iptables -I FORWARD -i '%[1]s+' -j ACCEPT; iptables -I FORWARD -o '%[1]s+' -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT (DOCKER-USER instead of FORWARD with Docker)", linkPrefix(tag)))
	}
	return nil
}
