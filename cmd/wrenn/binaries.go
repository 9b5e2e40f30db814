package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// removeStaleBinaries removes from dir the copies of the sandbox kernel and the
// guest agent that earlier builds of wrenn left, but for those in keep and those
// that are needed: the processes of a sandbox run the one, and its bundle names the
// other, as does the manifest of an image. agent is the host agent's directory.
func removeStaleBinaries(dir, agent string, keep ...string) error {
	var stale []string
	for _, pattern := range []string{"runsc-*", "envd-*"} {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return err
		}
		stale = append(stale, found...)
	}
	stale = slices.DeleteFunc(stale, func(path string) bool { return slices.Contains(keep, path) })
	if len(stale) == 0 {
		return nil
	}
	used, err := usedBinaries(agent)
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range stale {
		if !used(path) {
			errs = append(errs, os.Remove(path))
		}
	}
	return errors.Join(errs...)
}

// usedBinaries returns what tells whether a file is used by a process of this
// host, or named in the bundle of an instance, the manifest of an image or the record of a
// sandbox.
func usedBinaries(agent string) (func(path string) bool, error) {
	var naming [][]byte
	for _, pattern := range []string{"instances/*/config.json", "images/*/manifest.json", "sandboxes/*/image/manifest.json", "sandboxes/*/record.json"} {
		paths, err := filepath.Glob(filepath.Join(agent, pattern))
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			data, err := os.ReadFile(path)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return nil, err
			}
			naming = append(naming, data)
		}
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	running := make(map[string]bool)
	for _, p := range processes {
		if exe, err := os.Readlink(filepath.Join("/proc", p.Name(), "exe")); err == nil {
			running[strings.TrimSuffix(exe, " (deleted)")] = true
		}
	}
	return func(path string) bool {
		return running[path] || slices.ContainsFunc(naming, func(b []byte) bool { return bytes.Contains(b, []byte(filepath.Base(path))) })
	}, nil
}
