package sandbox

import "strings"

const (
	nameAlphabet = idAlphabet + "-_"
	maxName      = 128
	defaultTag   = "default"
)

// ParseName takes "[team/]name[:tag]" apart, which is what templates and snapshots
// are called by. Case does not matter, and the tag "default" is as none: what is
// returned as name is "name" or "name:tag". The error is of kind ErrInvalid.
func ParseName(s string) (team, name string, err error) {
	rest := strings.ToLower(s)
	if before, after, found := strings.Cut(rest, "/"); found {
		if team, rest = before, after; team == "" {
			rest = ""
		}
	}
	name, tag, tagged := strings.Cut(rest, ":")
	if name == "" || len(s) > maxName || strings.Trim(team, nameAlphabet) != "" || strings.Trim(name, nameAlphabet) != "" ||
		tagged && (tag == "" || strings.Trim(tag, nameAlphabet+".") != "") {
		return "", "", Errorf(ErrInvalid, "name %q: want name, name:tag or team/name:tag, of at most %d letters, digits, - and _", clip(s), maxName)
	}
	if tagged && tag != defaultTag {
		name += ":" + tag
	}
	return team, name, nil
}
