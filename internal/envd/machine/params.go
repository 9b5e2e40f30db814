package machine

import (
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// Params is what the host can say on the kernel's command line, as
// wrenn.<name>=<value>. Everything has a default.
type Params struct {
	Hostname  string       // wrenn.hostname: the name until /init or the metadata name the sandbox
	Link      string       // wrenn.link: the name of the network interface
	Address   netip.Prefix // wrenn.ip
	Gateway   netip.Addr   // wrenn.gateway
	Resolvers []netip.Addr // wrenn.dns: addresses with commas between; the gateway by default
	MTU       int          // wrenn.mtu: 0 leaves it
	MMDS      bool         // wrenn.mmds=1: the metadata service can be asked who the sandbox is
	Restart   bool         // end with a reset rather than a power-off: wrenn.poweroff=restart|off

	invalid []error
}

// readParams reads the file that holds the command line; without one all is as
// by default.
func readParams(file string) Params {
	line, _ := os.ReadFile(file)
	return parseParams(string(line), hasACPI())
}

// parseParams reads a kernel command line. What is not valid is reported and
// its default taken; what comes last wins, as with the kernel's own parameters.
func parseParams(line string, acpi bool) Params {
	p := Params{
		Link:    "eth0",
		Address: netip.MustParsePrefix("169.254.0.21/30"),
		Gateway: netip.MustParseAddr("169.254.0.22"),
		Restart: !acpi,
	}
	for word := range strings.FieldsSeq(line) {
		if word == "--" {
			break // the rest is for init's own arguments
		}
		name, value, _ := strings.Cut(word, "=")
		if name == "reboot" && strings.ContainsAny(value, "k") {
			p.Restart = true // the machine's monitor waits for the keyboard controller's reset
		}
		name, ours := strings.CutPrefix(name, "wrenn.")
		if !ours {
			continue
		}
		if err := p.set(name, value); err != nil {
			p.invalid = append(p.invalid, fmt.Errorf("wrenn.%s=%.100q: %w", name, value, err))
		}
	}
	if len(p.Resolvers) == 0 {
		p.Resolvers = []netip.Addr{p.Gateway}
	}
	return p
}

func (p *Params) set(name, value string) error {
	switch name {
	case "hostname":
		if !validName(value) {
			return fmt.Errorf("not a host's name")
		}
		p.Hostname = value
	case "link":
		if value == "" || len(value) > 15 || strings.ContainsAny(value, "/:") {
			return fmt.Errorf("not an interface's name")
		}
		p.Link = value
	case "ip":
		return parse(&p.Address, value, netip.ParsePrefix)
	case "gateway":
		return parse(&p.Gateway, value, netip.ParseAddr)
	case "dns":
		var list []netip.Addr
		for part := range strings.SplitSeq(value, ",") {
			addr, err := netip.ParseAddr(part)
			if err != nil {
				return err
			}
			list = append(list, addr)
		}
		p.Resolvers = list
	case "mtu":
		mtu, err := strconv.Atoi(value)
		if err != nil || mtu < 576 || mtu > 65535 {
			return fmt.Errorf("want 576 to 65535")
		}
		p.MTU = mtu
	case "mmds":
		return parse(&p.MMDS, value, strconv.ParseBool)
	case "poweroff":
		if value != "restart" && value != "off" {
			return fmt.Errorf(`want "restart" or "off"`)
		}
		p.Restart = value == "restart"
	default:
		return fmt.Errorf("unknown parameter")
	}
	return nil
}

// parse sets into only to what is valid.
func parse[T any](into *T, value string, read func(string) (T, error)) error {
	v, err := read(value)
	if err == nil {
		*into = v
	}
	return err
}

func hasACPI() bool {
	_, err := os.Stat("/sys/firmware/acpi/tables")
	return err == nil
}
