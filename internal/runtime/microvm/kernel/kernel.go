// Package kernel keeps the kernels that virtual machines boot.
//
//	DIR/current            link to the one that new machines get
//	DIR/NAME/vmlinux       the kernel, uncompressed
//	DIR/NAME/vmlinuz       as the distribution packed it, where there is such a file
//	DIR/NAME/modules/      the modules that a machine needs, and `list`: their order
//	DIR/NAME/kernel.json   what it is
//	DIR/NAME/initramfs-…   the modules and the boot program of this build of wrenn
//
// NAME has the kernel's release and a hash of vmlinux and the modules. What has a name is whole
// and never changes: everything is made beside and renamed.
package kernel

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

const (
	currentName   = "current"
	vmlinuxName   = "vmlinux"
	vmlinuzName   = "vmlinuz"
	modulesName   = "modules"
	moduleList    = "list"
	manifestName  = "kernel.json"
	initramfsName = "initramfs-" // and the hash of what is in it
)

// Kernel is one that is installed.
type Kernel struct {
	Name      string    `json:"name"`              // of its directory
	Version   string    `json:"version"`           // as uname -r says it
	Vmlinux   string    `json:"vmlinux"`           // path: uncompressed ELF
	Vmlinuz   string    `json:"vmlinuz,omitempty"` // path: as packed; empty: there is none
	Initramfs string    `json:"initramfs"`         // path
	SHA256    string    `json:"sha256"`            // of vmlinux
	Source    string    `json:"source"`            // package and version, or path of the file it was made from
	PVH       bool      `json:"pvh"`               // vmlinux starts by the PVH entry: QEMU can boot it as it is
	Modules   []string  `json:"modules"`           // in the order they are loaded
	Installed time.Time `json:"installed"`
	Current   bool      `json:"current"` // new machines get this one
}

// Load returns the current kernel of dir. Where none is installed the error is of
// kind sandbox.ErrNotFound. The initramfs is made anew when this build of wrenn has
// another boot program than the one that installed the kernel.
func Load(dir string) (Kernel, error) {
	name, err := os.Readlink(filepath.Join(dir, currentName))
	if errors.Is(err, fs.ErrNotExist) {
		return Kernel{}, sandbox.Errorf(sandbox.ErrNotFound, "no kernel for virtual machines is installed: run wrenn kernel install")
	}
	if err != nil {
		return Kernel{}, fmt.Errorf("find the current kernel: %w", err)
	}
	return read(dir, filepath.Base(name))
}

// List returns the kernels of dir by name.
func List(dir string) ([]Kernel, error) {
	found, err := filepath.Glob(filepath.Join(dir, "*", manifestName))
	if err != nil {
		return nil, err
	}
	current, err := os.Readlink(filepath.Join(dir, currentName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("find the current kernel: %w", err)
	}
	kernels := []Kernel{} // in JSON a list, also when it is empty
	for _, path := range found {
		name := filepath.Base(filepath.Dir(path))
		if name == currentName {
			continue
		}
		k, err := read(dir, name)
		if err != nil {
			return nil, err
		}
		k.Current = name == filepath.Base(current)
		kernels = append(kernels, k)
	}
	return kernels, nil
}

func read(dir, name string) (Kernel, error) {
	home := filepath.Join(dir, name)
	data, err := os.ReadFile(filepath.Join(home, manifestName))
	if err != nil {
		return Kernel{}, fmt.Errorf("read kernel %s: %w; run wrenn kernel install", name, err)
	}
	var k Kernel
	if err := json.Unmarshal(data, &k); err != nil {
		return Kernel{}, fmt.Errorf("read kernel %s: %w; remove %s and run wrenn kernel install", name, err, home)
	}
	k.Name = name
	k.Vmlinux = filepath.Join(home, vmlinuxName)
	k.Vmlinuz = filepath.Join(home, vmlinuzName)
	if _, err := os.Stat(k.Vmlinux); err != nil {
		return Kernel{}, fmt.Errorf("kernel %s is not whole: %w; remove %s and run wrenn kernel install", name, err, home)
	}
	if _, err := os.Stat(k.Vmlinuz); err != nil {
		k.Vmlinuz = ""
	}
	k.Initramfs, err = ensureInitramfs(home, k.Modules)
	return k, err
}
