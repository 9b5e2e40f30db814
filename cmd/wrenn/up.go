package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/wrenn/wrenn/internal/accesslog"
	"github.com/wrenn/wrenn/internal/proxy"
)

// upOptions are what `wrenn up` can be told. They are kept in the lock file, so
// that `wrenn up --detach` sees whether the running platform is the one asked for.
type upOptions struct {
	Listen        string         `json:"listen"`
	Domain        string         `json:"domain"`
	TLSListen     string         `json:"tls_listen"`
	TLSCert       string         `json:"tls_cert"`
	TLSKey        string         `json:"tls_key"`
	ACME          acmeOptions    `json:"acme"`
	NoHostCAs     bool           `json:"no_host_cas"`
	NetworkCIDR   netip.Prefix   `json:"network_cidr"`
	AllowCIDRs    []netip.Prefix `json:"allow_cidrs"`
	Resolver      netip.Addr     `json:"resolver"`
	ReadySlots    int            `json:"ready_slots"`
	PoolMemory    int64          `json:"pool_memory"` // MiB
	CompressAfter time.Duration  `json:"compress_after"`
	Runtime       string         `json:"runtime"`
	TeamSandboxes int            `json:"team_sandboxes"`
	TeamImages    int64          `json:"team_images"` // MiB
	Connections   int            `json:"connections"`
	AccessLog     string         `json:"access_log"` // a path, "-", "off", or empty for the one in the data directory
}

func newUpCmd() *cobra.Command {
	var (
		opts   upOptions
		detach bool
		cidr   string
		allow  []string
		dns    string
	)
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start the platform",
		Long: `Start the platform: control plane, host agent and data plane in one process.

In the foreground, Ctrl-C ends the platform and its sandboxes. SIGTERM ends only
the platform: the sandboxes go on and the next start takes them over.
With --detach it starts in the background, checks itself by running a line of
Python in a new sandbox, and returns.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := opts.parse(cidr, allow, dns); err != nil {
				return err
			}
			if cmd.Flags().Changed("access-log") {
				if err := opts.parseAccessLog(); err != nil {
					return err
				}
			}
			dir, err := openDataDir(dataFlag(cmd))
			if err != nil {
				return err
			}
			if detach {
				return upDetached(cmd.Context(), dir, opts, cmd.OutOrStdout())
			}
			return upForeground(cmd.Context(), dir, opts)
		},
	}
	opts.addServerFlags(cmd.Flags())
	opts.addAgentFlags(cmd.Flags(), &cidr, &allow, &dns)
	cmd.Flags().BoolVar(&detach, "detach", false, "start in the background and check that it works")
	return cmd
}

// addServerFlags are those of the control plane and the data plane.
func (o *upOptions) addServerFlags(f *pflag.FlagSet) {
	f.StringVar(&o.Listen, "listen", defaultListen, "address of the API and the data plane, plain HTTP")
	f.StringVar(&o.Domain, "domain", "", "domain of the data plane: ports are at {port}-{id}.DOMAIN, the API at api.DOMAIN (default wrenn.localhost with the port of --listen)")
	o.addTLSFlags(f)
	f.BoolVar(&o.NoHostCAs, "no-host-cas", false, "do not trust, inside sandboxes, the certificate authorities added to this host")
	f.IntVar(&o.TeamSandboxes, "team-sandboxes", 0, "sandboxes that one team may have running at once (default any number)")
	f.Int64Var(&o.TeamImages, "team-images", 0, "room on the disk in MiB for one team's snapshots and paused sandboxes (default any)")
	f.IntVar(&o.Connections, "connections-per-sandbox", proxy.DefaultLimit, "requests and WebSockets open at once to the applications of one sandbox")
	f.StringVar(&o.AccessLog, "access-log", "", "file for the access log of the data plane, - for standard output, or off (default DIR/log/access.log)")
}

// addAgentFlags are those of the host agent.
func (o *upOptions) addAgentFlags(f *pflag.FlagSet, cidr *string, allow *[]string, dns *string) {
	f.StringVar(cidr, "network-cidr", "", "address range for sandbox networks (default: the first of a few that meets no route of this host)")
	f.StringSliceVar(allow, "allow-cidr", nil, "private range that sandboxes may reach all the same; may be given several times")
	f.StringVar(dns, "resolver", "", "DNS server for sandboxes (default: this host's)")
	f.StringVar(&o.Runtime, "runtime", runtimeAuto, "what sandboxes run in: "+strings.Join(runtimeNames, ", "))
	f.IntVar(&o.ReadySlots, "ready-slots", 8, "network slots prepared ahead")
	f.Int64Var(&o.PoolMemory, "pool-memory", 512, "memory in MiB for sandboxes that are kept ready before anybody asks; 0 keeps none")
	f.DurationVar(&o.CompressAfter, "compress-after", 24*time.Hour, "time after which the memory of a paused sandbox is compressed, if it is a virtual machine's; 0 never does")
}

func (o *upOptions) parse(cidr string, allow []string, dns string) error {
	if err := o.parseAgent(cidr, allow, dns); err != nil {
		return err
	}
	return o.parseServer()
}

func (o *upOptions) parseAgent(cidr string, allow []string, dns string) (err error) {
	if cidr != "" {
		if o.NetworkCIDR, err = netip.ParsePrefix(cidr); err != nil {
			return usageErrorf("--network-cidr: %v", err)
		}
	}
	for _, s := range allow {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return usageErrorf("--allow-cidr: %v", err)
		}
		o.AllowCIDRs = append(o.AllowCIDRs, p)
	}
	if dns != "" {
		if o.Resolver, err = netip.ParseAddr(dns); err != nil {
			return usageErrorf("--resolver: %v", err)
		}
	}
	if o.ReadySlots < 1 || o.ReadySlots > 256 {
		return usageErrorf("--ready-slots: want 1 to 256")
	}
	if o.PoolMemory < 0 {
		return usageErrorf("--pool-memory: want 0 or more")
	}
	if o.CompressAfter < 0 {
		return usageErrorf("--compress-after: want 0 or more")
	}
	return o.parseRuntime()
}

func (o *upOptions) parseServer() error {
	if _, _, err := net.SplitHostPort(o.Listen); err != nil {
		return usageErrorf("--listen: %v (want HOST:PORT)", err)
	}
	o.Domain = strings.ToLower(o.Domain)
	if err := o.checkTLS(); err != nil {
		return err
	}
	if o.TeamSandboxes < 0 || o.TeamImages < 0 {
		return usageErrorf("--team-sandboxes, --team-images: want 0 or more")
	}
	if o.Connections < 1 {
		return usageErrorf("--connections-per-sandbox: want more than 0")
	}
	return nil
}

// parseAccessLog makes a path independent of the working directory.
func (o *upOptions) parseAccessLog() (err error) {
	switch o.AccessLog {
	case "":
		return usageErrorf("--access-log: want a path, - or off")
	case accesslog.Stdout, accessLogOff:
		return nil
	}
	if o.AccessLog, err = filepath.Abs(o.AccessLog); err != nil {
		return fmt.Errorf("--access-log: %w", err)
	}
	return nil
}

// upForeground runs the platform until it is told to end.
func upForeground(ctx context.Context, dir dataDir, opts upOptions) error {
	return runForeground(ctx, part{
		name: "wrenn up", data: dir, lock: dir, start: func(ctx context.Context, progress io.Writer, log *slog.Logger) (*platform, error) {
			return startPlatform(ctx, dir, opts, progress, log)
		},
		ready: func(p *platform) string {
			return fmt.Sprintf("Wrenn is up at %s (data in %s). Ctrl-C ends it and its sandboxes.", p.apiURL, dir)
		},
	}, opts)
}

// part is what a process is of a platform: all of it, or one of its halves.
type part struct {
	name  string
	data  dataDir
	lock  dataDir // where the lock is that makes it the only one
	start func(ctx context.Context, progress io.Writer, log *slog.Logger) (*platform, error)
	ready func(p *platform) string // told once it serves
}

// runForeground runs a part of the platform until it is told to end.
func runForeground(ctx context.Context, self part, opts upOptions) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s makes network namespaces and cgroups and needs root: run it with sudo", self.name)
	}
	parent := parentPipe()
	log := newLogger(os.Stderr)
	// net/http writes what guests and clients get wrong to the standard logger.
	stdlog.SetFlags(0)
	stdlog.SetOutput(slog.NewLogLogger(log.Handler(), slog.LevelDebug).Writer())
	err := runPart(ctx, self, opts, parent, log)
	if err != nil {
		parent.fail(err)
	}
	return err
}

func runPart(ctx context.Context, part part, opts upOptions, parent *parentLink, log *slog.Logger) error {
	lock, err := takeLock(ctx, part.data, part.lock)
	if err != nil {
		return err
	}
	defer lock.release()
	self := runningPlatform{PID: os.Getpid(), Program: programID(), Options: opts, Started: time.Now()}
	if err := lock.describe(self); err != nil {
		return err
	}

	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	first := make(chan os.Signal, 1)
	go func() {
		sig, ok := <-signals
		if !ok {
			return
		}
		first <- sig
		cancel()
		<-signals // a second one means now
		os.Exit(130)
	}()

	p, err := part.start(ctx, parent.progress(os.Stderr), log)
	if err != nil {
		if len(first) > 0 {
			return errors.New("interrupted while starting; sandboxes that ran before go on")
		}
		return err
	}
	self.Ready, self.APIURL = true, p.apiURL
	if err := lock.describe(self); err != nil {
		return errors.Join(err, p.stop(false))
	}
	parent.ready()
	fmt.Fprintln(os.Stderr, part.ready(p))

	select {
	case err := <-p.ended:
		return errors.Join(err, p.stop(false))
	case sig := <-first:
		kill := sig == syscall.SIGINT
		log.Info("stopping", "signal", sig.String(), "end_sandboxes", kill)
		return p.stop(kill)
	}
}

// takeLock takes a lock of the data directory, unless somebody has it: a `wrenn down` that
// is cleaning up lets go of it in a moment.
func takeLock(ctx context.Context, data, lockDir dataDir) (*instanceLock, error) {
	for {
		lock, err := acquireLock(lockDir)
		if !errors.Is(err, errLocked) {
			return lock, err
		}
		r, running, err := findRunning(ctx, lockDir)
		if err != nil {
			return nil, err
		}
		if running {
			return nil, fmt.Errorf("process %d is running on %s already: stop it with `wrenn down --data %s`, or choose another directory with --data", r.PID, data, data)
		}
	}
}

func newLogger(w io.Writer) *slog.Logger {
	level := slog.LevelInfo
	if os.Getenv("WRENN_DEBUG") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}
