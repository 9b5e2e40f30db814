// Command testguest is the guest's init in the runtime conformance suite: a tiny
// HTTP server that uses up whatever the suite asks it to use up. It stands where
// the guest agent stands in a real sandbox, so that a runtime is tested without
// a template or a guest agent.
package main

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/envd/machine"
)

// Where the guest listens; the suite dials these.
const (
	port     = 8080
	sidePort = 8081 // a child of init, after POST /side
	echoPort = 8082 // plain TCP: lines come back
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "-vm" { // as the guest agent is told
		os.Args = append(os.Args[:1], os.Args[2:]...)
		virtual = machine.Boot()
	}
	switch arg := strings.Join(os.Args[1:], " "); arg {
	case "child":
		select {} // ends only with the sandbox
	case "bomb":
		bomb()
	case "side":
		serveSide()
	case "terminal":
		answerLines(os.Stdin, os.Stdout)
	default:
		serve(arg)
	}
}

// virtual is the virtual machine that this is the first process of, or nil.
var virtual *machine.Machine

// addAgent serves what a guest agent does for the host around snapshots. Where the
// engine has no need of it, nothing is done.
func addAgent(mux *http.ServeMux) {
	mux.HandleFunc("POST /resumed", func(w http.ResponseWriter, r *http.Request) {
		if virtual == nil {
			return
		}
		asker, err := netip.ParseAddrPort(r.RemoteAddr)
		if err == nil {
			err = virtual.Resumed(netip.AddrPortFrom(asker.Addr().Unmap(), asker.Port()))
		}
		if err == nil {
			err = virtual.Name(r.FormValue("hostname"))
		}
		answer(w, err)
	})
	mux.HandleFunc("POST /sync", func(http.ResponseWriter, *http.Request) {
		if virtual != nil {
			unix.Sync()
		}
	})
}

// serve answers the suite's requests. greeting is what /ping answers.
func serve(greeting string) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ping", func(w http.ResponseWriter, _ *http.Request) {
		host, _ := os.Hostname()
		fmt.Fprintf(w, "%s pid=%d host=%s", greeting, os.Getpid(), host)
	})
	mux.HandleFunc("GET /read", read)
	mux.HandleFunc("POST /write", write)
	mux.HandleFunc("POST /alloc", alloc)
	mux.HandleFunc("POST /spawn", spawn)
	mux.HandleFunc("POST /bomb", func(http.ResponseWriter, *http.Request) { go bomb() })
	mux.HandleFunc("POST /burn", burn)
	mux.HandleFunc("POST /askdisk", askDisk)
	addState(mux)
	addFiles(mux)
	addAgent(mux)
	mux.HandleFunc("POST /exit", func(_ http.ResponseWriter, r *http.Request) { os.Exit(number(r, "code")) })
	log.Fatal(http.ListenAndServe(":"+strconv.Itoa(port), mux))
}

func number(r *http.Request, name string) int {
	n, _ := strconv.Atoi(r.FormValue(name))
	return n
}

// read answers the contents of the file at path.
func read(w http.ResponseWriter, r *http.Request) {
	data, err := os.ReadFile(r.FormValue("path"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Write(data)
}

// write appends the body, or mib MiB of it when mib is given, to the file at path.
func write(w http.ResponseWriter, r *http.Request) {
	f, err := os.OpenFile(r.FormValue("path"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err == nil {
		block := bytes.Repeat([]byte{1}, 1<<20)
		for i := number(r, "mib"); i > 0 && err == nil; i-- {
			_, err = f.Write(block)
		}
		if err == nil {
			_, err = io.Copy(f, r.Body)
		}
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

var (
	keepMu sync.Mutex
	keep   [][]byte
)

// alloc takes mib MiB of memory, touches every page and keeps it.
func alloc(w http.ResponseWriter, r *http.Request) {
	for range number(r, "mib") {
		block := make([]byte, 1<<20)
		for i := 0; i < len(block); i += 4096 {
			block[i] = 1
		}
		keepMu.Lock()
		keep = append(keep, block)
		keepMu.Unlock()
	}
}

// spawn starts n processes that stay, and answers how many it could start.
func spawn(w http.ResponseWriter, r *http.Request) {
	started := 0
	for range number(r, "n") {
		if err := exec.Command("/proc/self/exe", "child").Start(); err != nil {
			break
		}
		started++
	}
	fmt.Fprint(w, started)
}

// bomb starts copies of itself for as long as it can.
func bomb() {
	for {
		if err := exec.Command("/proc/self/exe", "bomb").Start(); err != nil {
			time.Sleep(time.Millisecond) // at the limit: keep pressing
		}
	}
}

// burn keeps n threads busy for ms milliseconds.
func burn(_ http.ResponseWriter, r *http.Request) {
	end := time.Now().Add(time.Duration(number(r, "ms")) * time.Millisecond)
	var wg sync.WaitGroup
	for range number(r, "n") {
		wg.Go(func() {
			for time.Now().Before(end) {
			}
		})
	}
	wg.Wait()
}
