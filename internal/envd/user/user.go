// Package user finds the accounts of the sandbox and resolves the paths that
// clients send on their behalf.
package user

import (
	"context"
	"fmt"
	"os/user"
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

// Lookup finds the account called name. The error is an UnknownError when there
// is none.
func Lookup(name string) (User, error) {
	account, err := lookupAccount(name)
	if err != nil {
		return User{}, err
	}
	u := User{Name: account.Username, Home: account.HomeDir}
	if u.UID, err = parseID(account.Uid); err != nil {
		return User{}, fmt.Errorf("parse uid of %s: %w", name, err)
	}
	if u.GID, err = parseID(account.Gid); err != nil {
		return User{}, fmt.Errorf("parse gid of %s: %w", name, err)
	}
	return u, nil
}

// LookupWithGroups is Lookup that fills in Groups too, which takes a scan of
// the group database.
func LookupWithGroups(name string) (User, error) {
	u, err := Lookup(name)
	if err != nil {
		return User{}, err
	}
	ids, err := (&user.User{Username: u.Name, Gid: strconv.FormatUint(uint64(u.GID), 10)}).GroupIds()
	if err != nil {
		return User{}, fmt.Errorf("list groups of %s: %w", name, err)
	}
	for _, id := range ids {
		if gid, err := parseID(id); err == nil {
			u.Groups = append(u.Groups, gid)
		}
	}
	return u, nil
}

func lookupAccount(name string) (*user.User, error) {
	account, err := user.Lookup(name)
	if err == nil {
		return account, nil
	}
	// Root is root even in an image without an account database.
	if name == "root" {
		return &user.User{Username: "root", Uid: "0", Gid: "0", HomeDir: "/root"}, nil
	}
	return nil, UnknownError{Name: name}
}

func parseID(s string) (uint32, error) {
	id, err := strconv.ParseUint(s, 10, 32)
	return uint32(id), err
}

// Names translates numeric owners to names for one listing, asking the account
// database once per owner. Unknown ids stay numbers. Not for concurrent use.
type Names struct {
	users, groups map[uint32]string
}

// User returns the name of the account uid.
func (n *Names) User(uid uint32) string {
	return cached(&n.users, uid, func(id string) (string, error) {
		u, err := user.LookupId(id)
		if err != nil {
			return "", err
		}
		return u.Username, nil
	})
}

// Group returns the name of the group gid.
func (n *Names) Group(gid uint32) string {
	return cached(&n.groups, gid, func(id string) (string, error) {
		g, err := user.LookupGroupId(id)
		if err != nil {
			return "", err
		}
		return g.Name, nil
	})
}

func cached(names *map[uint32]string, id uint32, lookup func(string) (string, error)) string {
	if name, ok := (*names)[id]; ok {
		return name
	}
	number := strconv.FormatUint(uint64(id), 10)
	name, err := lookup(number)
	if err != nil {
		name = number
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
