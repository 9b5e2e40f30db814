package machine

import (
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// clientFrom returns a client on the host's side with another source address.
func (v *vm) clientFrom(addr string) *http.Client {
	c := &http.Client{Transport: &http.Transport{DialContext: v.dialFrom(v.host, addr)}}
	v.t.Cleanup(c.CloseIdleConnections)
	return c
}

func TestOnlyTheHostInitializesAndPowersOff(t *testing.T) {
	t.Parallel()
	v := startVM(t, vmConfig{cmdline: "reboot=k panic=1"}).up()
	within := v.within()
	for _, addr := range []string{"127.0.0.1:49983", guestAddr} {
		if got := post(t, within, addr+"/poweroff", ""); got != 403 {
			t.Errorf("power-off from within to %s: %d", addr, got)
		}
		if got := post(t, within, addr+"/init", `{"accessToken":"stolen"}`); got != 401 {
			t.Errorf("init from within to %s: %d", addr, got)
		}
	}
	if got := post(t, v.client, guestAddr+"/init", `{"accessToken":"secret"}`); got != 204 {
		t.Fatalf("init from the host: %d", got)
	}
	if got := post(t, v.client, guestAddr+"/poweroff", ""); got != 401 {
		t.Errorf("power-off without the token: %d", got)
	}
	req, _ := http.NewRequest("POST", "http://"+guestAddr+"/poweroff", nil)
	req.Header.Set("X-Access-Token", "secret")
	resp, err := v.client.Do(req)
	if err != nil || resp.StatusCode != 204 {
		t.Fatalf("power-off: %v, %v", resp, err)
	}
	resp.Body.Close()
	if how := v.down(5 * time.Second); how != syscall.SIGHUP { // what the kernel makes of a restart
		t.Errorf("it ended by %v", how)
	}
}

func TestProgramsAreAskedToEndAndThenKilled(t *testing.T) {
	t.Parallel()
	v := startVM(t, vmConfig{}).up()
	v.background("polite")
	v.background("stubborn")
	begin := time.Now()
	v.cmd.Process.Signal(syscall.SIGTERM)
	how := v.down(termLimit + killLimit + 5*time.Second)
	if how != syscall.SIGHUP && how != syscall.SIGINT {
		t.Errorf("it ended by %v", how)
	}
	if took := time.Since(begin); took < termLimit {
		t.Errorf("the stubborn one was killed after %v", took)
	}
	if got, err := os.ReadFile(filepath.Join(v.out, "polite")); err != nil || string(got) != "asked" {
		t.Errorf("the polite one was not asked: %q, %v", got, err)
	}
}

func TestSignalsThatAreNoRequestAreNoEnd(t *testing.T) {
	t.Parallel()
	v := startVM(t, vmConfig{}).up()
	v.background("polite")
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM, syscall.SIGPIPE, syscall.SIGABRT, syscall.SIGTSTP, syscall.SIGXCPU} {
		if err := v.cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
	}
	if got := v.run("tty", true); !strings.Contains(got, "terminal=true") {
		t.Errorf("after the signals: %q", got)
	}
	begin := time.Now()
	v.cmd.Process.Signal(syscall.SIGINT) // ctrl-alt-del
	v.down(5 * time.Second)
	if took := time.Since(begin); took > termLimit/2 {
		t.Errorf("with programs that end when asked it took %v", took)
	}
	if _, err := os.Stat(filepath.Join(v.out, "polite")); err != nil {
		t.Error("the program was not asked to end")
	}
}

func TestAMachineWhoseAgentCannotServeEndsAndSaysWhy(t *testing.T) {
	t.Parallel()
	v := startVM(t, vmConfig{args: "-listen 192.0.2.7:1"})
	how := v.down(20 * time.Second)
	if how != syscall.SIGHUP && how != syscall.SIGINT {
		t.Errorf("it ended by %v: %s", how, &v.console)
	}
	if !strings.Contains(v.console.String(), "192.0.2.7:1") {
		t.Errorf("the console says %q", &v.console)
	}
}

func TestWhatIsMountedIsUnmountedFromTheLastOn(t *testing.T) {
	const info = `21 1 253:0 / / rw - ext4 /dev/vda rw
22 21 0:4 / /proc rw - proc proc rw
30 21 253:16 / /data rw shared:1 - ext4 /dev/vdb rw
31 30 253:32 / /data/a\040b rw - xfs /dev/vdc rw
broken
32 21 0:9 / /run rw - tmpfs run rw
`
	if got, want := mountedBelow(info), []string{"/run", "/data/a b", "/data"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
