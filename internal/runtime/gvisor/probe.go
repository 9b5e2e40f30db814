package gvisor

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/wrenn/wrenn/internal/runtime/life"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// probeStatus is what the probe's guest exits with; nothing else does.
const probeStatus = 42

// Probe implements runtime.Runtime. It runs a sandbox whose only program is a
// few instructions long, with the engine, the platform and the cgroups that real
// sandboxes use.
func (r *Runtime) Probe(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("gvisor needs root: run the platform as root (sudo)")
	}
	dir, err := os.MkdirTemp(r.cfg.Root, "probe-")
	if err != nil {
		return fmt.Errorf("probe gvisor: %w", err)
	}
	defer os.RemoveAll(dir)
	id := sandbox.NewID()
	defer func() {
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), life.FreeTime)
		defer cancel()
		if err := free(cleanup, r.set, r.cfg.Root, id, dir); err != nil {
			r.cfg.Log.Warn("probe left something", "err", err)
		}
	}()
	if err := writeProbe(dir, r.set.Group(id)); err != nil {
		return fmt.Errorf("probe gvisor: %w", err)
	}
	log := filepath.Join(dir, logFile)
	args := append(commonFlags(r.cfg.Root), "--network=none", "--log="+log,
		"--overlay2=root:dir="+workingDir+",size=1m", "run", "--bundle="+dir, string(id))
	err = r.exec(ctx, log, args)
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() == probeStatus:
		return nil
	case err == nil:
		return errors.New("gvisor does not run here: the probe's guest did not run its program")
	default:
		return fmt.Errorf("gvisor does not run here: %w (it needs seccomp, cgroups, user and mount namespaces; a container must be privileged)", err)
	}
}

func writeProbe(dir, cgroup string) error {
	program, err := exitProgram(probeStatus)
	if err != nil {
		return err
	}
	rootfs := filepath.Join(dir, "rootfs")
	if err := os.MkdirAll(filepath.Join(rootfs, "proc"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(rootfs, "probe"), program, 0o755); err != nil {
		return err
	}
	spec, err := json.Marshal(&specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: rootfs},
		Process: &specs.Process{Args: []string{"/probe"}, Cwd: "/"},
		Mounts:  []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}},
		Linux:   &specs.Linux{CgroupsPath: cgroup},
	})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, specFile), spec, 0o600)
}

// exitProgram is an ELF executable that does nothing but exit with status.
func exitProgram(status byte) ([]byte, error) {
	const base, headers = 0x400000, 64 + 56
	var code []byte
	var machine uint16
	switch goruntime.GOARCH {
	case "amd64":
		machine = 62
		code = []byte{
			0xbf, status, 0, 0, 0, // mov edi, status
			0xb8, 231, 0, 0, 0, // mov eax, exit_group
			0x0f, 0x05, // syscall
		}
	case "arm64":
		machine = 183
		for _, instruction := range []uint32{
			0xd2800000 | uint32(status)<<5, // mov x0, status
			0xd2800000 | 94<<5 | 8,         // mov x8, exit_group
			0xd4000001,                     // svc 0
		} {
			code = binary.LittleEndian.AppendUint32(code, instruction)
		}
	default:
		return nil, fmt.Errorf("gvisor does not run on %s", goruntime.GOARCH)
	}
	size := uint64(headers + len(code))
	var elf bytes.Buffer
	for _, field := range []any{
		// File header: 64 bits, little endian, executable, one program header.
		[16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, uint16(2), machine, uint32(1),
		uint64(base + headers), uint64(64), uint64(0),
		uint32(0), uint16(64), uint16(56), uint16(1), uint16(0), uint16(0), uint16(0),
		// Program header: load the whole file, to be read and executed.
		uint32(1), uint32(5), uint64(0), uint64(base), uint64(base), size, size, uint64(4096),
		code,
	} {
		_ = binary.Write(&elf, binary.LittleEndian, field) // a bytes.Buffer never fails
	}
	return elf.Bytes(), nil
}
