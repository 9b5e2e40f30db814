package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
)

// Leftovers names every host-wide thing that carries the tag: namespaces, links,
// the nftables table and the route that holds the range.
func Leftovers(tag string) ([]string, error) {
	if err := checkTag(tag); err != nil {
		return nil, err
	}
	names, links, err := named(tag)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, n := range names {
		out = append(out, "netns "+n)
	}
	for _, n := range links {
		out = append(out, "link "+n)
	}
	has, err := hasHostTable(tag)
	if err != nil {
		return nil, err
	}
	if has {
		out = append(out, "nftables table "+tableName(tag))
	}
	_, held, err := hostRoutes(tag)
	if err != nil {
		return nil, err
	}
	if held.IsValid() {
		out = append(out, "route unreachable "+held.String())
	}
	return out, nil
}

// named lists the tag's namespaces and links by name.
func named(tag string) (namespaces, links []string, err error) {
	entries, err := os.ReadDir(netnsDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("list network namespaces: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), nsPrefix(tag)) {
			namespaces = append(namespaces, e.Name())
		}
	}
	all, err := dump(netlink.LinkList)
	if err != nil {
		return nil, nil, fmt.Errorf("list links: %w", err)
	}
	for _, l := range all {
		if strings.HasPrefix(l.Attrs().Name, linkPrefix(tag)) {
			links = append(links, l.Attrs().Name)
		}
	}
	return namespaces, links, nil
}

// dump lists again where the kernel's list changed while it was read: others on
// the host make and remove links and routes at any time.
func dump[T any](list func() ([]T, error)) (out []T, err error) {
	for range 100 {
		out, err = list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return out, err
}

// indexes lists the slots of which anything is on the host, in order.
func indexes(tag string) ([]int, error) {
	namespaces, links, err := named(tag)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, n := range namespaces {
		if i, ok := indexOf(n, nsPrefix(tag)); ok {
			out = append(out, i)
		}
	}
	for _, n := range links {
		if i, ok := indexOf(n, linkPrefix(tag)); ok {
			out = append(out, i)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// RemoveAll removes everything of the tag, slots in use included. Nothing may
// have a Pool of the tag open. It is idempotent.
func RemoveAll(ctx context.Context, tag string) error {
	if err := checkTag(tag); err != nil {
		return err
	}
	all, err := indexes(tag)
	if err != nil {
		return err
	}
	var errs []error
	for _, i := range all {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		errs = append(errs, destroySlot(tag, i))
	}
	errs = append(errs, removeHostTable(tag), releaseRange(tag))
	return errors.Join(errs...)
}
