// Package xconnect has net/http accept WebSockets over HTTP/2 (the extended CONNECT
// of RFC 8441). Importing it is enough.
//
// net/http can, and asks the environment once, when it is initialized, whether it
// should. Packages are initialized in the order of their import paths, each after what
// it imports (Go's specification, "Program initialization"): this one imports nothing
// but os, and comes before net/http by its name. A test of package server holds it.
package xconnect

import (
	"os"
	"strings"
)

const (
	variable = "GODEBUG"
	setting  = "http2xconnect="
)

var before, wasSet = os.LookupEnv(variable)

func init() {
	if strings.Contains(before, setting) {
		return // somebody has decided already
	}
	if err := os.Setenv(variable, strings.TrimPrefix(before+","+setting+"1", ",")); err != nil {
		panic(err) // the name and the value are well-formed
	}
}

// Restore puts the environment back as it was, for programs that are started.
func Restore() {
	var err error
	if wasSet {
		err = os.Setenv(variable, before)
	} else {
		err = os.Unsetenv(variable)
	}
	if err != nil {
		panic(err) // the name and the value are well-formed
	}
}
