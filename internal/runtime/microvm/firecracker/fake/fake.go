// Package fake is a program that answers like Firecracker, for tests on machines
// that cannot run it. It keeps Firecracker's rules: which call is allowed when, which
// fields a version knows, what an answer looks like, that a machine is paused for a
// snapshot, and that its memory comes over a userfaultfd. There is no guest: each time
// the machine goes on, it counts on by one in its memory.
//
// It is stricter in one thing: it refuses what the version calls deprecated.
package fake

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
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
	MMDS      []string          `json:"mmds"` // interfaces
}

type drive struct {
	ID       string `json:"drive_id"`
	Path     string `json:"path_on_host"`
	ReadOnly bool   `json:"is_read_only"`
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
	if !ok || m.minor < rule.since {
		return nil, refusal(fmt.Sprintf("Invalid request method and/or path: %s %s.", r.Method, strings.TrimPrefix(r.URL.Path, "/")))
	}
	body := map[string]json.RawMessage{}
	if r.Method != http.MethodGet {
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			return nil, refusal(fmt.Sprintf("An error occurred when deserializing the json body of a request: %v.", err))
		}
		if err := m.check(rule, body); err != nil {
			return nil, err
		}
	}
	if rule.id != "" && text(body, rule.id) != id {
		return nil, refusal("The id from the path does not match the id from the body!")
	}
	if rule.when == before && m.state != notStarted {
		return nil, errAfter
	}
	if rule.when == after && m.state == notStarted {
		return nil, errBefore
	}
	m.configured = m.configured || rule.configures
	if rule.do == nil {
		return nil, nil
	}
	return rule.do(m, body)
}

// check compares a body's fields with those that the version knows.
func (m *machine) check(rule rule, body map[string]json.RawMessage) error {
	if rule.fields == nil {
		return nil
	}
	wrong := func(words, field string) error {
		return refusal(fmt.Sprintf("An error occurred when deserializing the json body of a request: %s `%s`.", words, field))
	}
	for name := range body {
		f, ok := rule.fields[name]
		if !ok || m.minor < f.since {
			return wrong("unknown field", name)
		}
		if f.until != 0 && m.minor >= f.until {
			return wrong("deprecated field", name)
		}
	}
	for name, f := range rule.fields {
		if _, ok := body[name]; f.needed && !ok {
			return wrong("missing field", name)
		}
	}
	return nil
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
