package kernel

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// wanted is what a machine needs and a distribution's kernel has as modules: the
// bus its devices are on, disk, network, random numbers, the balloon, what the guest
// agent makes ports of the loopback reachable with, and what
// ends connections that a resumed guest still thinks open.
var wanted = []string{
	"virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng",
	"virtio_balloon", "vmgenid", "ext4", "tcp_diag", "nft_chain_nat", "nft_redir",
}

// copyModules copies those of wanted that are below from, with what they need, to
// dir, and returns their files in the order to load them. What is not there counts
// as built into the kernel: a machine that lacks it says so when it boots.
func copyModules(from, dir string) ([]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		base, isModule := strings.CutSuffix(d.Name(), ".ko")
		if !isModule && strings.Contains(d.Name(), ".ko.") {
			return fmt.Errorf("%s is compressed: unpack the modules first", path)
		}
		if isModule {
			files[moduleName(base)] = path
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("look for modules: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	var order []string
	var add func(name string) error
	add = func(name string) error {
		file := name + ".ko"
		path, ok := files[name]
		if !ok || slices.Contains(order, file) {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		needs, err := dependencies(data)
		if err != nil {
			return fmt.Errorf("read module %s: %w", path, err)
		}
		for _, other := range needs {
			if err := add(other); err != nil {
				return err
			}
		}
		order = append(order, file)
		return os.WriteFile(filepath.Join(dir, file), data, 0o644)
	}
	for _, name := range wanted {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleName is how the kernel calls the module in the file base.ko.
func moduleName(base string) string { return strings.ReplaceAll(base, "-", "_") }

// dependencies reads from a module which others must be loaded before it.
func dependencies(module []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("it is no kernel module")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var needs []string
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		list, ok := bytes.CutPrefix(entry, []byte("depends="))
		if !ok {
			continue
		}
		for name := range strings.SplitSeq(string(list), ",") {
			if name != "" {
				needs = append(needs, moduleName(name))
			}
		}
	}
	return needs, nil
}
