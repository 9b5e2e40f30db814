package kernel

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// The directory holds a README besides, so that the package compiles in a tree
// where the boot program has not been built yet.
//
//go:embed bin
var embedded embed.FS

func bootProgram() ([]byte, error) {
	bin, err := embedded.ReadFile("bin/guestboot")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("this wrenn was built without the boot program of its virtual machines: build it with `make build`")
	}
	if err != nil {
		return nil, fmt.Errorf("read embedded boot program: %w", err)
	}
	return bin, nil
}

// ensureInitramfs returns the path of the archive in home that has the boot
// program of this build and the modules, making it when it is not there.
func ensureInitramfs(home string, modules []string) (string, error) {
	boot, err := bootProgram()
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(boot) // the modules of a kernel never change
	path := filepath.Join(home, initramfsName+hex.EncodeToString(sum[:8]))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	archive, err := makeInitramfs(boot, filepath.Join(home, modulesName), modules)
	if err != nil {
		return "", fmt.Errorf("make initramfs: %w", err)
	}
	if err := writeFile(path, archive); err != nil {
		return "", fmt.Errorf("write initramfs: %w", err)
	}
	return path, nil
}

// makeInitramfs makes the archive. It is not compressed: it comes from the host's
// page cache, and the guest would pay for unpacking it.
func makeInitramfs(boot []byte, dir string, modules []string) ([]byte, error) {
	var out bytes.Buffer
	a := archive{w: &out}
	a.dir("dev")
	a.console("dev/console")
	a.file("init", 0o755, boot)
	if len(modules) > 0 {
		a.dir(modulesName)
		a.file(modulesName+"/"+moduleList, 0o644, []byte(strings.Join(modules, "\n")+"\n"))
	}
	for _, name := range modules {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		a.file(modulesName+"/"+name, 0o644, data)
	}
	a.end()
	return out.Bytes(), nil
}

// An archive is a cpio of the format "newc", the one that kernels unpack.
type archive struct {
	w     *bytes.Buffer
	inode int
}

func (a *archive) dir(name string) { a.entry(name, 0o40755, 0, 0, nil) }

func (a *archive) file(name string, mode int, data []byte) {
	a.entry(name, 0o100000|mode, 0, 0, data)
}

// console makes the device that the first process prints to.
func (a *archive) console(name string) { a.entry(name, 0o20600, 5, 1, nil) }

func (a *archive) end() { a.entry("TRAILER!!!", 0, 0, 0, nil) }

func (a *archive) entry(name string, mode, major, minor int, data []byte) {
	a.inode++
	fmt.Fprintf(a.w, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		a.inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0)
	a.w.WriteString(name)
	a.w.WriteByte(0)
	a.pad()
	a.w.Write(data)
	a.pad()
}

// pad goes on at a multiple of 4 bytes.
func (a *archive) pad() { a.w.Write(make([]byte, -a.w.Len()&3)) }
