package envd

import (
	"errors"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/envd/files"
)

// stepClock sets the clock to what the host's was at arrival, when it is off by
// more than the request's way here explains: after a resume it stands where it
// was. Where the sandbox may not set its clock, the host's own is used and right.
// An agent that is not pid 1 shares a clock that is not the sandbox's, and leaves
// it alone.
func (a *Agent) stepClock(told, arrival time.Time) {
	if !a.ownsMachine {
		return
	}
	told = told.Add(time.Since(arrival)) // by the clock that is never set
	const maxBehind, maxAhead = 50 * time.Millisecond, 5 * time.Second
	if behind := time.Until(told); behind <= maxBehind && behind >= -maxAhead {
		return
	}
	err := a.setClock(told)
	if err != nil && !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.ENOSYS) {
		a.log.Warn("clock not set", "error", err)
	}
}

func setClock(t time.Time) error {
	ts, err := unix.TimeToTimespec(t)
	if err != nil {
		return err
	}
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// servePowerOff serves POST /poweroff: for the host, which may end the machine,
// and not for programs in it. Those with the right to can send pid 1 a signal.
func (a *Agent) servePowerOff(w http.ResponseWriter, r *http.Request) {
	if a.machine == nil {
		files.WriteError(w, http.StatusNotFound, errors.New("this sandbox is no machine of its own"))
		return
	}
	if !a.fromHost(r) {
		files.WriteError(w, http.StatusForbidden, errors.New("only the host can power the sandbox off here"))
		return
	}
	a.log.Info("powering off", "asked_by", r.RemoteAddr)
	w.WriteHeader(http.StatusNoContent)
	_ = http.NewResponseController(w).Flush() // the end may overtake the answer otherwise
	a.machine.Stop()
}

// serveSync serves POST /sync: the host is about to take an image of the disk, on
// which what has been written has to be. Where the sandbox has no disk of its own,
// there is nothing to do.
func (a *Agent) serveSync(w http.ResponseWriter, _ *http.Request) {
	if a.machine != nil {
		unix.Sync()
	}
	w.WriteHeader(http.StatusNoContent)
}

// remoteAddr is the other end of the connection that a request came by.
func remoteAddr(r *http.Request) netip.AddrPort {
	remote, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port())
}

// fromHost reports whether a request comes from outside the machine, where only
// the host can reach this port under a route that its proxy refuses.
func (a *Agent) fromHost(r *http.Request) bool {
	remote := remoteAddr(r)
	return remote.IsValid() && a.machine.Outside(remote.Addr())
}

func (a *Agent) serveMetrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	files.WriteJSON(w, http.StatusOK, a.meter.Measure())
}

func (a *Agent) serveEnvs(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	files.WriteJSON(w, http.StatusOK, a.settings.Env())
}

// serveLogs serves GET /logs?after=<unix ns>.
func (a *Agent) serveLogs(w http.ResponseWriter, r *http.Request) {
	var after int64
	if s := r.URL.Query().Get("after"); s != "" {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			files.WriteError(w, http.StatusBadRequest, errors.New("after must be a time in unix nanoseconds"))
			return
		}
		after = n
	}
	w.Header().Set("Cache-Control", "no-store")
	files.WriteJSON(w, http.StatusOK, a.ring.After(after))
}

// IsInit reports whether this process is the sandbox's pid 1.
func IsInit() bool { return os.Getpid() == 1 }
