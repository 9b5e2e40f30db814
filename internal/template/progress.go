package template

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/term"
)

// phases is how many times a build calls begin.
const phases = 3

// progress tells a person how far a build is. On a terminal the current phase is
// one line that moves; elsewhere it is printed anew every few seconds.
type progress struct {
	w        io.Writer
	terminal bool

	phase   int
	name    string
	started time.Time
	printed time.Time
	status  string

	retrieved, unpacked, configured int // packages, of the running step
	total                           int // packages to install; 0 while unknown
}

func newProgress(w io.Writer) *progress {
	if w == nil {
		w = io.Discard
	}
	f, ok := w.(*os.File)
	return &progress{w: w, terminal: ok && term.IsTerminal(int(f.Fd()))}
}

// line prints a line that stays.
func (p *progress) line(format string, args ...any) {
	if p.terminal {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
	fmt.Fprintf(p.w, format+"\n", args...)
}

// begin ends the running phase and starts the next.
func (p *progress) begin(name string) {
	p.end()
	p.phase++
	p.name, p.started, p.printed = name, time.Now(), time.Time{}
	p.retrieved, p.unpacked, p.configured, p.total = 0, 0, 0, 0
	p.update("")
}

// end prints how long the running phase took.
func (p *progress) end() {
	if p.name == "" {
		return
	}
	p.line("[%d/%d] %s: done in %.0f s", p.phase, phases, p.name, time.Since(p.started).Seconds())
	p.name = ""
}

// update shows status as what the phase is at, unless it was shown just now.
func (p *progress) update(status string) {
	pause := 5 * time.Second
	if p.terminal {
		pause = 100 * time.Millisecond
	}
	p.status = status
	if time.Since(p.printed) < pause {
		return
	}
	p.printed = time.Now()
	text := fmt.Sprintf("[%d/%d] %s", p.phase, phases, p.name)
	if status != "" {
		text += fmt.Sprintf(": %s (%.0f s)", status, time.Since(p.started).Seconds())
	}
	if p.terminal {
		fmt.Fprintf(p.w, "\r\x1b[K%s", text)
		return
	}
	p.line("%s", text)
}

// debootstrapLine reads one line of debootstrap's output.
func (p *progress) debootstrapLine(line string) {
	verb, rest, ok := strings.Cut(strings.TrimPrefix(line, "I: "), " ")
	if !ok || !strings.HasPrefix(line, "I: ") || strings.HasPrefix(rest, "the ") {
		return
	}
	switch verb {
	case "Retrieving":
		p.retrieved++
		p.update(fmt.Sprintf("%d packages downloaded", p.retrieved))
	case "Unpacking":
		p.unpacked++
		p.update(fmt.Sprintf("%d of %d packages unpacked", p.unpacked, p.retrieved))
	case "Configuring":
		p.configured++
		p.update(fmt.Sprintf("%d of %d packages configured", p.configured, p.retrieved))
	}
}

// aptLine reads one line of apt's output, which has status lines among it:
// "dlstatus:<n>:<percent>:Retrieving file <i> of <total>" and
// "pmstatus:<package>:<percent>:<what>".
func (p *progress) aptLine(line string) {
	fields := strings.SplitN(line, ":", 4)
	if len(fields) < 4 {
		return
	}
	switch fields[0] {
	case "dlstatus":
		var i, total int
		if _, err := fmt.Sscanf(fields[3], "Retrieving file %d of %d", &i, &total); err == nil {
			p.total = total
			p.update(fmt.Sprintf("%d of %d packages downloaded", i, total))
		}
	case "pmstatus":
		switch {
		case strings.HasPrefix(fields[3], "Unpacking"):
			p.unpacked++
			p.update(strconv.Itoa(p.unpacked) + p.ofTotal() + " packages unpacked")
		case strings.HasPrefix(fields[3], "Configuring"):
			p.configured++
			p.update(strconv.Itoa(p.configured) + p.ofTotal() + " packages configured")
		}
	}
}

func (p *progress) ofTotal() string {
	if p.total == 0 {
		return ""
	}
	return " of " + strconv.Itoa(p.total)
}
