// Command testguest is what the tests run in a machine that has no other programs.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

func main() {
	switch os.Args[1] {
	case "env":
		fmt.Println(strings.Join(os.Environ(), "\n"))
	case "tty":
		_, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
		name, _ := os.Readlink("/proc/self/fd/0")
		var st unix.Stat_t
		must(unix.Fstat(0, &st))
		fmt.Printf("terminal=%v name=%s gid=%d mode=%o\n", err == nil, name, st.Gid, st.Mode&0o777)
	case "limits":
		var l unix.Rlimit
		must(unix.Getrlimit(unix.RLIMIT_NOFILE, &l))
		fmt.Println(l.Cur)
	case "orphans": // leaves processes without a parent, which end at once
		for range 20 {
			must(exec.Command("/testguest", "orphan").Run())
		}
	case "orphan":
		must(exec.Command("/testguest", "exit").Start())
	case "exit":
	case "polite": // ends when asked, and writes down that it was
		asked := make(chan os.Signal, 1)
		signal.Notify(asked, syscall.SIGTERM)
		fmt.Println("ready")
		<-asked
		must(os.WriteFile("/out/polite", []byte("asked"), 0o644))
	case "stubborn":
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
		fmt.Println("ready")
		for { // until it is killed
			_ = unix.Pause()
		}
	}
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
