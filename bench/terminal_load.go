package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
)

// loadOrder is what a load process is told, as JSON on its standard input.
type loadOrder struct {
	URL     string `json:"url"` // of the platform, or of a relay before it
	Sandbox string `json:"sandbox"`

	Sockets   int     `json:"sockets"` // of messageRate messages a second each
	Upgrade   bool    `json:"upgrade"` // sockets are WebSockets, not streams
	Polls     int     `json:"polls"`   // a second, all together
	Downloads int     `json:"downloads"`
	Uploads   int     `json:"uploads"`
	Stalled   int     `json:"stalled"` // downloads whose reader has stopped
	Limit     float64 `json:"limit"`   // share of the machine above which transfers are slowed down
	Rate      float64 `json:"rate"`    // bytes per second that transfers begin with
}

// fullLoad is the load of an application that is used to the full.
var fullLoad = loadOrder{Sockets: 8, Polls: 100, Downloads: 4, Uploads: 2, Stalled: 50, Limit: .6, Rate: 64 * mebibyte}

const (
	messageRate = 50 // a second, per socket
	pollWorkers = 16

	// loadPatience is how long the load may take until all of it flows. Where
	// it cannot, it is measured as it is.
	loadPatience = 5 * time.Second
	// governorSettles is how long the governor is given to find the rate.
	governorSettles = 4 * time.Second
)

// loadReport is what a load process did between being settled and its end.
type loadReport struct {
	Seconds  float64 `json:"seconds"`
	Messages int64   `json:"messages"` // that came back
	Polls    int64   `json:"polls"`    // answered
	Down     int64   `json:"down"`     // bytes
	Up       int64   `json:"up"`       // bytes
	Flowing  int64   `json:"flowing"`  // connections on which something has come or gone
	Blocked  int64   `json:"blocked"`  // downloads that could not go on, seen from the application
	Rate     float64 `json:"rate"`     // bytes per second allowed at the end
	Errors   int64   `json:"errors"`
	Error    string  `json:"error,omitempty"` // the first
}

// load is the state of a load process.
type load struct {
	loadOrder
	http     *http.Client
	governor *governor

	messages, polls, down, up, flowing, blocked, errors atomic.Int64
	progress                                            chan struct{} // one for each connection that flows

	mu    sync.Mutex
	first error
}

// RunTerminalLoad loads an application in a sandbox, in a process of its own so
// that its work does not delay the keys. in holds a loadOrder and stays open as
// long as the load is wanted; out gets a line when the load has settled, and a
// loadReport at the end.
func RunTerminalLoad(in io.Reader, out io.Writer) error {
	orders := bufio.NewReader(in)
	line, err := orders.ReadBytes('\n')
	if err != nil {
		return err
	}
	l := &load{http: loadClient()}
	if err := json.Unmarshal(line, &l.loadOrder); err != nil {
		return err
	}
	l.progress = make(chan struct{}, l.connections())
	l.governor = newGovernor(l.Limit, l.Rate, func() int64 { return l.down.Load() + l.up.Load() })
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, orders)
		cancel()
	}()
	var workers sync.WaitGroup
	l.start(ctx, &workers)
	l.settle(ctx)
	before, begin := l.report(), time.Now()
	if _, err := fmt.Fprintln(out, "settled"); err != nil {
		return err
	}
	<-ctx.Done()
	r := l.report()
	r.Seconds = time.Since(begin).Seconds()
	r.Messages -= before.Messages
	r.Polls -= before.Polls
	r.Down -= before.Down
	r.Up -= before.Up
	workers.Wait()
	return json.NewEncoder(out).Encode(r)
}

// loadClient never has two requests on one connection.
func loadClient() *http.Client {
	http1 := new(http.Protocols)
	http1.SetHTTP1(true)
	return &http.Client{Transport: &http.Transport{
		DialContext:         (&net.Dialer{Timeout: loadPatience}).DialContext,
		Protocols:           http1,
		MaxIdleConnsPerHost: pollWorkers,
		DisableCompression:  true,
		WriteBufferSize:     transferUnit,
		ReadBufferSize:      transferUnit,
	}}
}

// connections is how many are to flow before the load is there.
func (l *load) connections() int {
	return l.Sockets + min(l.Polls, 1) + l.Downloads + l.Uploads + l.Stalled
}

func (l *load) report() loadReport {
	r := loadReport{
		Messages: l.messages.Load(), Polls: l.polls.Load(), Down: l.down.Load(), Up: l.up.Load(),
		Flowing: l.flowing.Load(), Blocked: l.blocked.Load(), Rate: float64(l.governor.limiter.Limit()), Errors: l.errors.Load(),
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.first != nil {
		r.Error = l.first.Error()
	}
	return r
}

// start starts everything. Readers that stop come first: where they take
// something away from others, it is gone when the others come.
func (l *load) start(ctx context.Context, workers *sync.WaitGroup) {
	run := func(what string, n int, work func(context.Context) error) {
		for range n {
			workers.Go(func() {
				if err := work(ctx); err != nil && ctx.Err() == nil {
					l.fail(fmt.Errorf("%s: %w", what, err))
				}
			})
		}
	}
	run("stalled download", l.Stalled, l.stall)
	socket := l.stream
	if l.Upgrade {
		socket = l.webSocket
	}
	run("messages", l.Sockets, socket)
	if l.Polls > 0 {
		due := make(chan struct{})
		run("polls", 1, func(ctx context.Context) error { return every(ctx, time.Second/time.Duration(l.Polls), due) })
		run("poll", pollWorkers, func(ctx context.Context) error { return l.poll(ctx, due) })
	}
	run("download", l.Downloads, l.download)
	run("upload", l.Uploads, l.upload)
	if l.Downloads+l.Uploads > 0 {
		run("limit the load", 1, l.governor.run)
	}
}

func (l *load) fail(err error) {
	l.errors.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.first == nil {
		l.first = err
	}
}

// settle waits until everything flows, what has stopped has filled all buffers,
// and the rest has found its pace.
func (l *load) settle(ctx context.Context) {
	patience, cancel := context.WithTimeout(ctx, loadPatience)
	defer cancel()
	for waiting := l.connections(); waiting > 0; {
		select {
		case <-l.progress:
			waiting--
		case <-patience.Done():
			waiting = 0
		}
	}
	if l.Downloads+l.Uploads > 0 {
		select {
		case <-time.After(governorSettles):
		case <-ctx.Done():
		}
	}
	if l.Stalled == 0 {
		return
	}
	patience, cancel = context.WithTimeout(ctx, 2*loadPatience)
	defer cancel()
	look := time.NewTicker(100 * time.Millisecond)
	defer look.Stop()
	for l.countBlocked(patience) == nil && l.blocked.Load() < int64(l.Stalled) {
		select {
		case <-look.C:
		case <-patience.Done():
		}
	}
}

// countBlocked asks the application how many downloads do not move.
func (l *load) countBlocked(ctx context.Context) error {
	resp, err := l.get(ctx, "/blocked")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var n int64
	if _, err := fmt.Fscan(resp.Body, &n); err != nil {
		return err
	}
	l.blocked.Store(n)
	return nil
}

// flows notes that a connection is in use.
func (l *load) flows() {
	l.flowing.Add(1)
	l.progress <- struct{}{} // has room for all
}

// request prepares a request for the application.
func (l *load) request(ctx context.Context, method, path string, body io.Reader) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, method, l.URL+path, body)
	if err == nil {
		r.Header = sandboxPort(l.Sandbox, terminalAppPort)
	}
	return r, err
}

// sandboxPort is what sends a request to a port of a sandbox.
func sandboxPort(id string, port int) http.Header {
	return http.Header{"E2b-Sandbox-Id": {id}, "E2b-Sandbox-Port": {strconv.Itoa(port)}}
}

func (l *load) get(ctx context.Context, path string) (*http.Response, error) {
	r, err := l.request(ctx, http.MethodGet, path, nil)
	if err != nil {
		return nil, err
	}
	return do(l.http, r, http.StatusOK)
}

// stall reads the beginning of a download and then never again.
func (l *load) stall(ctx context.Context) error {
	resp, err := l.get(ctx, "/download")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 4<<10)); err != nil {
		return err
	}
	l.flows()
	<-ctx.Done()
	return nil
}

func (l *load) download(ctx context.Context) error {
	resp, err := l.get(ctx, "/download")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	block := make([]byte, transferUnit)
	for started := false; ; started = true {
		if err := l.governor.limiter.WaitN(ctx, transferUnit); err != nil {
			return err
		}
		if _, err := io.ReadFull(resp.Body, block); err != nil {
			return err
		}
		l.down.Add(transferUnit)
		if !started {
			l.flows()
		}
	}
}

func (l *load) upload(ctx context.Context) error {
	r, err := l.request(ctx, http.MethodPost, "/upload", &uploadBody{load: l, ctx: ctx})
	if err != nil {
		return err
	}
	return errors.Join(finish(do(l.http, r, http.StatusOK)), errors.New("upload ended"))
}

// uploadBody is a file without end.
type uploadBody struct {
	*load
	ctx   context.Context //nolint:containedctx // of the request whose body this is
	asked int
}

func (b *uploadBody) Read(p []byte) (int, error) {
	p = p[:min(len(p), transferUnit)]
	if err := b.governor.limiter.WaitN(b.ctx, len(p)); err != nil {
		return 0, err
	}
	b.up.Add(int64(len(p)))
	if b.asked++; b.asked == 2 { // what was read first has been taken
		b.flows()
	}
	return len(p), nil
}

// every says that something is due, unless nobody is there to do it.
func every(ctx context.Context, interval time.Duration, due chan<- struct{}) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		select {
		case due <- struct{}{}:
		default:
		}
	}
}

// poll asks whenever it is due.
func (l *load) poll(ctx context.Context, due <-chan struct{}) error {
	for {
		select {
		case <-due:
		case <-ctx.Done():
			return nil
		}
		if err := finish(l.get(ctx, "/poll")); err != nil {
			return err
		}
		if l.polls.Add(1) == 1 {
			l.flows()
		}
	}
}

func (l *load) webSocket(ctx context.Context) error {
	conn, resp, err := websocket.Dial(ctx, l.URL+"/messages", &websocket.DialOptions{ //nolint:bodyclose // Dial's documentation: not needed
		HTTPClient: l.http, HTTPHeader: sandboxPort(l.Sandbox, terminalAppPort),
	})
	if err != nil {
		if resp != nil {
			err = fmt.Errorf("%s: %w", resp.Status, err)
		}
		return err
	}
	defer conn.CloseNow() //nolint:errcheck // the load is over
	stream := websocket.NetConn(ctx, conn, websocket.MessageBinary)
	return l.exchange(ctx, stream, stream)
}

// stream sends messages in the body of a request, whose answer brings them back.
func (l *load) stream(ctx context.Context) error {
	body, in := io.Pipe()
	defer in.Close()
	r, err := l.request(ctx, http.MethodPost, "/messages", body)
	if err != nil {
		return err
	}
	resp, err := do(l.http, r, http.StatusOK)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return l.exchange(ctx, resp.Body, in)
}

// exchange sends messages at their rate and counts what comes back.
func (l *load) exchange(ctx context.Context, in io.Reader, out io.Writer) error {
	received := make(chan error, 1)
	go func() {
		message := make([]byte, messageSize)
		for started := false; ; started = true {
			if _, err := io.ReadFull(in, message); err != nil {
				received <- err
				return
			}
			l.messages.Add(1)
			if !started {
				l.flows()
			}
		}
	}()
	// Clients that know nothing of each other do not send at the same moment.
	select {
	case <-time.After(rand.N(time.Second / messageRate)):
	case <-ctx.Done():
		return nil
	}
	tick := time.NewTicker(time.Second / messageRate)
	defer tick.Stop()
	message := make([]byte, messageSize)
	for {
		select {
		case <-tick.C:
		case err := <-received:
			return err
		case <-ctx.Done():
			return nil
		}
		if _, err := out.Write(message); err != nil {
			return err
		}
	}
}
