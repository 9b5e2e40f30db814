package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/doctor"
	"github.com/wrenn/wrenn/internal/runtime/gvisor"
	"github.com/wrenn/wrenn/internal/template"
)

func newDoctorCmd() *cobra.Command {
	var (
		listen string
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check that this host has what the platform needs",
		Long: `Check that this host has what the platform needs. Where it is possible the thing
itself is tried: namespaces, address translation, a sandbox. Nothing is changed.

It exits with 1 when something is missing without which sandboxes cannot run.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			opts := doctor.Options{DataDir: dataFlag(cmd), Listen: listen, Runtime: tryRuntime}
			var err error
			if opts.DataDir, err = filepath.Abs(opts.DataDir); err != nil {
				return err
			}
			// What cannot be asked (the directory is not there) does not run.
			if running, _ := locked(dataDir(opts.DataDir)); running {
				platform, _ := readLock(dataDir(opts.DataDir))
				if !cmd.Flags().Changed("listen") {
					opts.Listen = platform.Options.Listen
				}
				opts.Running = opts.Listen == platform.Options.Listen
			}
			results := append(doctor.Check(cmd.Context(), opts), checkConfinement(cmd.Context(), dataDir(opts.DataDir))...)
			results = append(results, checkTemplates(cmd.Context(), dataDir(opts.DataDir))...)
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), results)
			} else {
				err = printDiagnosis(cmd.OutOrStdout(), results)
			}
			if err != nil {
				return err
			}
			if doctor.Worst(results) == doctor.Fail {
				return &exitError{code: exitFailed}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&listen, "listen", defaultListen, "address that the platform is to listen on; while one runs, by default its address")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON array")
	return cmd
}

// tryRuntime runs a sandbox with the runtime in a directory that is removed
// afterwards.
func tryRuntime(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "wrenn-doctor-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	binary, err := gvisor.InstallBinary(filepath.Join(dir, "bin"))
	if err != nil {
		return err
	}
	runtime, err := gvisor.New(gvisor.Config{
		Binary: binary, Root: filepath.Join(dir, "runsc"), Tag: dataDir(dir).tag(), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, runtime.Close()) }()
	return runtime.Probe(ctx)
}

// checkConfinement says what would confine Firecracker, where that is installed.
func checkConfinement(ctx context.Context, dir dataDir) []doctor.Result {
	if _, err := exec.LookPath("firecracker"); err != nil {
		return nil
	}
	r := doctor.Result{Name: "firecracker's confinement"}
	monitor, err := newFirecracker(ctx, dir)
	if err != nil {
		r.Verdict, r.Detail = doctor.Warn, err.Error()
		r.Remedy = "install firecracker and jailer of one release; sandboxes run in gVisor until then"
	} else {
		r.Verdict, r.Detail = doctor.OK, "machines are confined by "+monitor.Confinement()
	}
	return []doctor.Result{r}
}

// checkTemplates says of each template that is there whether it still is what was
// built: sandboxes share it, and nothing else notices a change.
func checkTemplates(ctx context.Context, dir dataDir) []doctor.Result {
	if _, err := os.Stat(dir.templates()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	builds, err := template.Load(dir.templates())
	if err != nil {
		return []doctor.Result{{Name: "templates", Verdict: doctor.Fail, Detail: err.Error(), Remedy: "remove what is damaged; the next start makes it again"}}
	}
	var results []doctor.Result
	for _, b := range builds {
		r := doctor.Result{Name: "template " + b.Alias, Verdict: doctor.OK, Detail: "build " + b.ID + " is as it was made"}
		if err := template.Verify(ctx, b); err != nil {
			r.Verdict, r.Detail = doctor.Fail, err.Error()
			r.Remedy = "stop the platform, remove " + filepath.Dir(b.RootFS) + " and start it again"
		}
		results = append(results, r)
	}
	return results
}

func printDiagnosis(w io.Writer, results []doctor.Result) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range results {
		fmt.Fprintf(table, "%s\t%s\t%s\n", r.Verdict, r.Name, r.Detail)
		if r.Remedy != "" {
			fmt.Fprintf(table, "\t\t→ %s\n", r.Remedy)
		}
	}
	if err := table.Flush(); err != nil {
		return err
	}
	verdict := map[doctor.Verdict]string{
		doctor.OK:   "This host has everything.",
		doctor.Warn: "Sandboxes can run here, with the drawbacks above.",
		doctor.Fail: "Sandboxes cannot run here before what failed is mended.",
	}[doctor.Worst(results)]
	_, err := fmt.Fprintln(w, "\n"+verdict)
	return err
}
