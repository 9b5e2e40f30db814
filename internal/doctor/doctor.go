// Package doctor checks whether a host has what the platform needs, by trying
// it where that is possible, and says how to mend what is missing. It changes
// nothing on the host.
package doctor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Verdict is what a check came to.
type Verdict string

// The verdicts, from best to worst.
const (
	OK   Verdict = "ok"
	Warn Verdict = "warn" // works, with the drawback that Detail names
	Fail Verdict = "fail" // sandboxes cannot run before this is mended
)

// Result is the outcome of one check.
type Result struct {
	Name    string  `json:"name"`
	Verdict Verdict `json:"verdict"`
	Detail  string  `json:"detail"`           // what was found
	Remedy  string  `json:"remedy,omitempty"` // what to do about it; empty when OK
}

// Options say what is to be checked.
type Options struct {
	DataDir string // of the platform; need not exist yet
	Listen  string // HOST:PORT that the platform will listen on; empty skips the check
	Running bool   // the platform runs on DataDir now and has Listen in use

	// Runtime tries the sandbox runtime; nil skips the check.
	Runtime func(context.Context) error
}

// Check makes every check and returns the results in a fixed order.
func Check(ctx context.Context, opts Options) []Result {
	h := host{root: "/"}
	results := []Result{
		root(),
		h.architecture(),
		h.kernel(),
		h.seccomp(),
		h.ptrace(),
		h.namespaces(),
		h.cgroups(),
		network(ctx),
		h.forwarding(),
		h.resolver(),
		h.debootstrap(),
		disk(opts.DataDir),
		h.memory(),
		openFiles(),
		clock(),
		h.kvm(),
		monitors(),
		h.tap(),
		guestKernel(opts.DataDir),
		linuxInKVM(opts.DataDir),
		reflinks(opts.DataDir),
		diskFile(opts.DataDir),
	}
	if opts.Listen != "" {
		results = append(results, port(ctx, opts.Listen, opts.Running))
	}
	if opts.Runtime != nil {
		results = append(results, runtimeProbe(ctx, opts.Runtime))
	}
	return results
}

// Worst returns the worst verdict of results.
func Worst(results []Result) Verdict {
	worst := OK
	for _, r := range results {
		if r.Verdict == Fail || worst == OK {
			worst = r.Verdict
		}
		if worst == Fail {
			break
		}
	}
	return worst
}

func ok(name, format string, args ...any) Result {
	return Result{Name: name, Verdict: OK, Detail: fmt.Sprintf(format, args...)}
}

func warn(name, remedy, format string, args ...any) Result {
	return Result{Name: name, Verdict: Warn, Detail: fmt.Sprintf(format, args...), Remedy: remedy}
}

func fail(name, remedy, format string, args ...any) Result {
	return Result{Name: name, Verdict: Fail, Detail: fmt.Sprintf(format, args...), Remedy: remedy}
}

func runtimeProbe(ctx context.Context, probe func(context.Context) error) Result {
	if err := probe(ctx); err != nil {
		return fail("sandbox runtime", "see the message, and the troubleshooting page in docs/", "%v", err)
	}
	return ok("sandbox runtime", "a sandbox started and ran a program")
}

// host reads the host's files below root, which is "/" but in tests.
type host struct{ root string }

func (h host) path(name string) string { return filepath.Join(h.root, name) }

// read returns the trimmed content of a file, empty when it cannot be read.
func (h host) read(name string) string {
	data, err := os.ReadFile(h.path(name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

func (h host) exists(name string) bool {
	_, err := os.Stat(h.path(name))
	return err == nil
}
