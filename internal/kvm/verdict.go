package kvm

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"
)

// Verdict is what came of booting a kernel with a monitor under this host's KVM. That
// /dev/kvm opens does not mean that it runs Linux, so it is tried; that takes seconds
// where it does not, so what came of it is kept in a file.
type Verdict struct {
	Boot    string    `json:"boot"`    // the host's boot_id
	Monitor string    `json:"monitor"` // and its version
	Kernel  string    `json:"kernel"`  // of the guest
	Refusal string    `json:"refusal,omitempty"`
	Time    time.Time `json:"time"`
}

// The files of the data directory that keep verdicts.
const (
	FirecrackerVerdict = "firecracker-probe.json"
	QEMUVerdict        = "kvm.json"
)

// A refusal may have been of a busy host, or one that lacked a module yet.
const refusalHolds = 5 * time.Minute

// Decide gives the verdict on a monitor and a kernel: the one that is kept in the file,
// as long as it holds, or what try, which boots the kernel, says now. The file may be
// removed at any time; where it cannot be written, as on a full disk, the next Decide tries
// again.
func Decide(ctx context.Context, file, monitor, kernel string, try func(context.Context) error) (Verdict, error) {
	known, err := Read(file)
	if err == nil && known.Monitor == monitor && known.Kernel == kernel && (known.Refusal == "" || time.Since(known.Time) < refusalHolds) {
		return known, nil
	}
	boot, err := bootID()
	if err != nil {
		return Verdict{}, err
	}
	now := Verdict{Boot: boot, Monitor: monitor, Kernel: kernel, Time: time.Now().UTC()}
	err = try(ctx)
	if ctx.Err() != nil {
		return Verdict{}, ctx.Err()
	}
	if err != nil {
		now.Refusal = err.Error()
	}
	data, err := json.Marshal(now)
	if err != nil {
		return Verdict{}, fmt.Errorf("keep what is known of KVM: %w", err)
	}
	if os.WriteFile(file, data, 0o600) != nil {
		_ = os.Remove(file) // what is in it now is none
	}
	return now, nil
}

// Read gives the verdict in a file, if it is of this boot of the host.
func Read(file string) (Verdict, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return Verdict{}, err
	}
	var v Verdict
	if err := json.Unmarshal(data, &v); err != nil {
		return Verdict{}, fmt.Errorf("read what is known of KVM: %w", err)
	}
	if boot, err := bootID(); err != nil || v.Boot != boot {
		return Verdict{}, fmt.Errorf("what is known of KVM is of an earlier boot of the host")
	}
	return v, nil
}

func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}
