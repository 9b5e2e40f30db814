// Package fake is a program that answers like Firecracker, for tests on machines
// that cannot run it. It keeps Firecracker's rules: which call is allowed when, which
// fields a version knows, what an answer looks like, that a machine is paused for a
// snapshot, and that its memory comes over a userfaultfd. There is no guest: each time
// the machine goes on, it counts on by one in its memory.
//
// It is stricter in one thing: it refuses what the version calls deprecated.
package fake

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"
)

// Prefix is what the name of the program begins with. The version follows:
// firecracker-1.14.0.
const Prefix = "firecracker-"

// IsProgram says whether this process was started as the fake, by its name.
func IsProgram() bool { return strings.HasPrefix(filepath.Base(os.Args[0]), Prefix+"1.") }

// Main is the program.
func Main() int {
	version := strings.TrimPrefix(filepath.Base(os.Args[0]), Prefix)
	parts := strings.Split(version, ".")
	minor, err := strconv.Atoi(parts[min(1, len(parts)-1)])
	if err != nil {
		fmt.Fprintf(os.Stderr, "%q is no version\n", version)
		return 153
	}
	flags := flag.NewFlagSet("firecracker", flag.ContinueOnError)
	show := flags.Bool("version", false, "")
	socket := flags.String("api-sock", "/run/firecracker.socket", "")
	id := flags.String("id", "anonymous-instance", "")
	noAPI := flags.Bool("no-api", false, "")
	flags.String("config-file", "", "")
	for _, name := range []string{"start-time-us", "start-time-cpu-us", "parent-cpu-time-us"} { // from the jailer
		flags.Uint64(name, 0, "")
	}
	if minor >= 13 {
		flags.Bool("enable-pci", false, "")
	}
	if err := flags.Parse(os.Args[1:]); err != nil {
		return 153
	}
	if *show {
		fmt.Printf("Firecracker v%s\n", version)
		return 0
	}
	if *noAPI { // there is no guest that could say anything
		fmt.Println("no kernel runs in a fake")
		return 0
	}
	l, err := net.Listen("unix", *socket) // an old socket in the way is an error
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Printf("Running Firecracker v%s\n", version)
	m := &machine{version: version, minor: minor, id: *id, state: notStarted, quit: make(chan struct{})}
	server := &http.Server{Handler: m, ReadHeaderTimeout: 5 * time.Second}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	select {
	case err = <-served:
	case <-m.quit: // lets the answer go out
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		err = server.Shutdown(ctx)
	}
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		fmt.Fprintln(os.Stderr, err)
	}
	return m.exit
}

// States.
const (
	notStarted = "Not started"
	running    = "Running"
	paused     = "Paused"
)

type machine struct {
	version string
	minor   int
	id      string

	mu         sync.Mutex // a call at a time, as in the original
	state      string
	configured bool // for a boot: nothing can be loaded any more
	kernel     bool
	config     config
	mmds       json.RawMessage
	hasMMDS    bool // there is a store for it
	metrics    bool // are written somewhere
	balloon    *balloon
	memory     *memory
	tap        int

	once sync.Once
	quit chan struct{}
	exit int
}

// config is what a snapshot keeps.
type config struct {
	CPUs      int               `json:"cpus"`
	MemoryMiB int64             `json:"memory"`
	Track     bool              `json:"track"`
	Drives    []drive           `json:"drives"`
	TAPs      map[string]string `json:"taps"` // by interface
	MACs      map[string]string `json:"macs"` // likewise
	MMDS      []string          `json:"mmds"` // interfaces
}

type drive struct {
	ID       string `json:"drive_id"`
	Path     string `json:"path_on_host"`
	Root     bool   `json:"is_root_device"`
	ReadOnly bool   `json:"is_read_only"`
}

// balloon is a device whose driver in the guest runs, and does at once what it is told.
type balloon struct {
	Amount  int64 `json:"amount_mib"`
	Seconds int   `json:"stats_polling_interval_s"`
	Hinting bool  `json:"free_page_hinting"`
	command int
	said    *int
}

// refusal is an error of Firecracker's: status 400, with a message.
type refusal string

func (r refusal) Error() string { return string(r) }

const (
	errBefore = refusal("The requested operation is not supported before starting the microVM.")
	errAfter  = refusal("The requested operation is not supported after starting the microVM.")
)

// ServeHTTP answers a call.
func (m *machine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out, err := m.call(r)
	w.Header().Set("Content-Type", "application/json")
	switch {
	case err != nil:
		w.WriteHeader(http.StatusBadRequest)
		_ = json.NewEncoder(w).Encode(map[string]string{"fault_message": err.Error()})
	case out == nil:
		w.WriteHeader(http.StatusNoContent)
	default:
		_ = json.NewEncoder(w).Encode(out)
	}
}

func (m *machine) call(r *http.Request) (any, error) {
	path, id := r.URL.Path, ""
	for _, kind := range []string{"/drives", "/network-interfaces"} {
		if rest, ok := strings.CutPrefix(path, kind+"/"); ok {
			path, id = kind, rest
		}
	}
	rule, ok := rules[r.Method+" "+path]
	if rest, hinting := strings.CutPrefix(path, "/balloon"); !ok && hinting && m.minor >= 14 {
		return nil, refusal(fmt.Sprintf("Unrecognized %s request path `%s`.", r.Method, rest))
	}
	if !ok || m.minor < rule.since {
		return nil, refusal(fmt.Sprintf("Invalid request method and/or path: %s %s.", r.Method, strings.Split(strings.TrimPrefix(r.URL.Path, "/"), "/")[0]))
	}
	body, err := m.read(r, rule)
	if err != nil {
		return nil, err
	}
	if err := cmp.Or(rule.checkID(path, id, body), m.checkTime(rule)); err != nil {
		return nil, err
	}
	m.configured = m.configured || rule.configures
	if rule.do == nil {
		return nil, nil
	}
	return rule.do(m, body)
}

// checkID compares the id in the path with the one in the body.
func (r rule) checkID(path, id string, body map[string]json.RawMessage) error {
	if r.id == "" {
		return nil
	}
	its := text(body, r.id)
	switch {
	case strings.ContainsFunc(id, func(r rune) bool { return r != '_' && !unicode.IsLetter(r) && !unicode.IsDigit(r) }):
		return refusal("API Resource IDs can only contain alphanumeric characters and underscores.")
	case its != id && path == "/drives":
		return refusal("The id from the path does not match the id from the body!")
	case its != id:
		return refusal(fmt.Sprintf("The id from the path [%s] does not match the id from the body [%s]!", id, its))
	}
	return nil
}

// checkTime refuses what is not for this time of the machine's life.
func (m *machine) checkTime(r rule) error {
	switch {
	case r.when == before && m.state != notStarted && r.hotplug && m.minor >= 16:
		return refusal("PCI is not enabled")
	case r.when == before && m.state != notStarted:
		return errAfter
	case r.when == after && m.state == notStarted:
		return errBefore
	}
	return nil
}

// read reads the body of a call. One that may be anything is under the empty name.
func (m *machine) read(r *http.Request, rule rule) (map[string]json.RawMessage, error) {
	body := map[string]json.RawMessage{}
	if r.Method == http.MethodGet {
		return body, nil
	}
	data, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	if len(data) == 0 {
		if rule.bodiless {
			return body, nil
		}
		return nil, refusal(fmt.Sprintf("Empty %s request.", r.Method))
	}
	var into any = &body
	if rule.anything {
		into = new(json.RawMessage)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return nil, unreadable(err.Error())
	}
	if rule.anything {
		return map[string]json.RawMessage{"": data}, nil
	}
	return body, m.check(rule, body)
}

var levels = []string{"off", "trace", "debug", "info", "warn", "warning", "error"}

func unreadable(words string) error {
	return refusal("An error occurred when deserializing the json body of a request: " + words + ".")
}

// check compares a body's fields with those that the version knows.
func (m *machine) check(rule rule, body map[string]json.RawMessage) error {
	for name, value := range body {
		f, ok := rule.fields[name]
		switch {
		case rule.bodiless && !ok:
			continue // of such calls it is not looked at
		case !ok || m.minor < f.since:
			return unreadable(fmt.Sprintf("unknown field `%s`", name))
		case f.until != 0 && m.minor >= f.until:
			return unreadable(fmt.Sprintf("deprecated field `%s`", name))
		case f.oneOf != nil && !slices.Contains(f.oneOf, text(body, name)):
			return unreadable(fmt.Sprintf("unknown variant `%s`", text(body, name)))
		case f.level && !slices.Contains(levels, strings.ToLower(text(body, name))):
			return unreadable("Invalid LevelFilter")
		case f.truth && string(value) != "true" && string(value) != "false":
			return unreadable(fmt.Sprintf("invalid type: `%s`, expected a boolean", value))
		}
	}
	for name, f := range rule.fields {
		if _, ok := body[name]; f.needed && !ok {
			return unreadable(fmt.Sprintf("missing field `%s`", name))
		}
	}
	return nil
}

// system puts an error of the host's into the words of the original's language.
func system(err error) string {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err.Error()
	}
	words := errno.Error()
	return fmt.Sprintf("%s%s (os error %d)", strings.ToUpper(words[:1]), words[1:], int(errno))
}

// fail ends the program once the answer is out.
func (m *machine) fail() {
	m.once.Do(func() { m.exit = 1; close(m.quit) })
}

func text(body map[string]json.RawMessage, name string) string {
	var s string
	_ = json.Unmarshal(body[name], &s) // missing or no text: none of those that are asked for
	return s
}
