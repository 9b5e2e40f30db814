// Package user finds the accounts of the sandbox and resolves the paths that
// clients send on their behalf.
package user

import (
	"context"
	"fmt"
	"strconv"
)

// User is an account that processes run as and files belong to.
type User struct {
	Name   string
	UID    uint32
	GID    uint32
	Groups []uint32 // supplementary groups
	Home   string
}

// UnknownError says that no account has that name.
type UnknownError struct{ Name string }

func (e UnknownError) Error() string { return fmt.Sprintf("invalid username: '%s'", e.Name) }

// system is the account database of the sandbox.
var system = database{passwd: "/etc/passwd", group: "/etc/group"}

// Lookup finds the account called name. The error is an UnknownError when there
// is none.
func Lookup(name string) (User, error) { return system.account(name) }

// LookupWithGroups is Lookup that fills in Groups too.
func LookupWithGroups(name string) (User, error) { return system.withGroups(name) }

func (d *database) withGroups(name string) (User, error) {
	u, err := d.account(name)
	if err != nil {
		return User{}, err
	}
	if u.Groups, err = d.memberships(u); err != nil {
		return User{}, fmt.Errorf("list groups of %s: %w", name, err)
	}
	return u, nil
}

// Names translates numeric owners to names for one listing, asking the account
// database once per owner. Unknown ids stay numbers. Not for concurrent use.
type Names struct {
	users, groups map[uint32]string
}

// User returns the name of the account uid.
func (n *Names) User(uid uint32) string { return cached(&n.users, uid, system.userName) }

// Group returns the name of the group gid.
func (n *Names) Group(gid uint32) string { return cached(&n.groups, gid, system.groupName) }

func cached(names *map[uint32]string, id uint32, lookup func(uint32) string) string {
	if name, ok := (*names)[id]; ok {
		return name
	}
	name := lookup(id)
	if name == "" {
		name = strconv.FormatUint(uint64(id), 10)
	}
	if *names == nil {
		*names = make(map[uint32]string)
	}
	(*names)[id] = name
	return name
}

type contextKey struct{}

// WithName returns a context that carries the name a request gave.
func WithName(ctx context.Context, name string) context.Context {
	return context.WithValue(ctx, contextKey{}, name)
}

// NameFrom returns the name the request gave, or fallback when it gave none.
func NameFrom(ctx context.Context, fallback string) string {
	if name, _ := ctx.Value(contextKey{}).(string); name != "" {
		return name
	}
	return fallback
}
