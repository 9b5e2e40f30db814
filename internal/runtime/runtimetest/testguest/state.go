package main

// What a guest has in memory that an image has to keep: processes, listeners,
// connections, terminals, open files.

import (
	"bufio"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var (
	ticks atomic.Int64 // of a clock that runs whenever the guest does
	conns atomic.Int64 // open connections to the echo server, and those of POST /dial
	held  struct {
		sync.Mutex
		file     *os.File // opened by POST /hold
		terminal *os.File // opened by POST /terminal
		lines    *bufio.Reader
		dialled  net.Conn // by POST /dial
	}
)

// addState serves what the suite asks of the guest's state.
func addState(mux *http.ServeMux) {
	go func() {
		for range time.Tick(5 * time.Millisecond) {
			ticks.Add(1)
		}
	}()
	go serveEcho()
	mux.HandleFunc("GET /ticks", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, ticks.Load()) })
	mux.HandleFunc("GET /conns", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, conns.Load()) })
	mux.HandleFunc("GET /stream", stream)
	mux.HandleFunc("POST /side", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, exec.Command("/proc/self/exe", "side").Start())
	})
	mux.HandleFunc("POST /hold", func(w http.ResponseWriter, r *http.Request) {
		held.Lock()
		defer held.Unlock()
		var err error
		held.file, err = os.OpenFile(r.FormValue("path"), os.O_CREATE|os.O_RDWR, 0o600)
		answer(w, err)
	})
	mux.HandleFunc("POST /held", writeHeld)
	mux.HandleFunc("POST /terminal", openTerminal)
	mux.HandleFunc("POST /type", typeLine)
	mux.HandleFunc("POST /dial", func(w http.ResponseWriter, r *http.Request) { answer(w, dial(r.FormValue("addr"))) })
	mux.HandleFunc("POST /dialled", useDialled)
	mux.HandleFunc("POST /hostname", func(w http.ResponseWriter, r *http.Request) {
		answer(w, unix.Sethostname([]byte(r.FormValue("name"))))
	})
}

func answer(w http.ResponseWriter, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

// stream sends the clock's ticks, one a line, until the client goes.
func stream(w http.ResponseWriter, r *http.Request) {
	for last := int64(-1); r.Context().Err() == nil; {
		now := ticks.Load()
		if now == last {
			time.Sleep(time.Millisecond)
			continue
		}
		last = now
		fmt.Fprintln(w, now)
		_ = http.NewResponseController(w).Flush()
	}
}

// serveSide is a child process that counts how often it was asked.
func serveSide() {
	var asked atomic.Int64
	log.Fatal(http.ListenAndServe(":"+strconv.Itoa(sidePort), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, asked.Add(1))
	})))
}

func serveEcho() {
	l, err := net.Listen("tcp", ":"+strconv.Itoa(echoPort))
	if err != nil {
		log.Fatal(err)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			log.Fatal(err)
		}
		conns.Add(1)
		go func() {
			defer conns.Add(-1)
			defer c.Close()
			_, _ = io.Copy(c, c)
		}()
	}
}

// writeHeld writes the body to the end of the file that is held open, and answers
// all that is in it.
func writeHeld(w http.ResponseWriter, r *http.Request) {
	held.Lock()
	defer held.Unlock()
	if _, err := io.Copy(held.file, r.Body); err != nil {
		answer(w, err)
		return
	}
	_, err := io.Copy(w, io.NewSectionReader(held.file, 0, 1<<20))
	answer(w, err)
}

// openTerminal starts a child that has a terminal.
func openTerminal(w http.ResponseWriter, _ *http.Request) {
	held.Lock()
	defer held.Unlock()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		answer(w, err)
		return
	}
	fd := int(master.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		answer(w, err)
		return
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		answer(w, err)
		return
	}
	slave, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		answer(w, err)
		return
	}
	defer slave.Close()
	cmd := exec.Command("/proc/self/exe", "terminal")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	held.terminal, held.lines = master, bufio.NewReader(master)
	answer(w, cmd.Start())
}

// typeLine types the line and answers what the terminal shows next: the line
// itself and the child's answer.
func typeLine(w http.ResponseWriter, r *http.Request) {
	held.Lock()
	defer held.Unlock()
	if _, err := fmt.Fprintln(held.terminal, r.FormValue("line")); err != nil {
		answer(w, err)
		return
	}
	for range 2 {
		line, err := held.lines.ReadString('\n')
		if err != nil {
			answer(w, err)
			return
		}
		fmt.Fprint(w, line)
	}
}

// answerLines numbers the lines that are typed.
func answerLines(in io.Reader, out io.Writer) {
	n := 0
	for lines := bufio.NewScanner(in); lines.Scan(); {
		n++
		fmt.Fprintf(out, "line %d is %q\n", n, lines.Text())
	}
}

// dial opens two connections, one as Go's programs do, and one whose reader blocks
// in the system call as those of most others do.
func dial(addr string) error {
	held.Lock()
	defer held.Unlock()
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return err
	}
	if held.dialled, err = net.Dial("tcp", addr); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); err != nil {
		return err
	}
	conns.Add(1)
	go func() {
		defer conns.Add(-1)
		_, _ = unix.Read(fd, make([]byte, 1))
	}()
	return nil
}

// useDialled sends the body over the connection of POST /dial and answers what
// comes back.
func useDialled(w http.ResponseWriter, r *http.Request) {
	held.Lock()
	defer held.Unlock()
	body, err := io.ReadAll(r.Body)
	if err == nil {
		err = held.dialled.SetDeadline(time.Now().Add(3 * time.Second))
	}
	if err == nil {
		_, err = held.dialled.Write(body)
	}
	if err == nil {
		_, err = io.ReadFull(held.dialled, body)
	}
	if err != nil {
		answer(w, err)
		return
	}
	w.Write(body)
}
