package filesystem

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"google.golang.org/protobuf/types/known/timestamppb"

	rpc "github.com/wrenn/wrenn/api/proto/filesystem"
	"github.com/wrenn/wrenn/internal/envd/filemeta"
	"github.com/wrenn/wrenn/internal/envd/user"
)

// describe returns what clients get to know about the file at path. Of a link,
// type and mode are its target's; the rest is its own.
func describe(path string, names *user.Names) (*rpc.EntryInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	e := &rpc.EntryInfo{
		Name:         text(filepath.Base(path)),
		Type:         typeOf(info.Mode()),
		Path:         text(path),
		Size:         info.Size(),
		Mode:         uint32(info.Mode().Perm()),
		Permissions:  info.Mode().String(),
		ModifiedTime: timestamppb.New(info.ModTime()),
		Metadata:     filemeta.Read(path),
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		e.Owner, e.Group = text(names.User(stat.Uid)), text(names.Group(stat.Gid))
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		describeTarget(e, path)
	}
	return e, nil
}

func describeTarget(e *rpc.EntryInfo, path string) {
	e.Type, e.Mode = rpc.FileType_FILE_TYPE_UNSPECIFIED, 0
	target, err := filepath.EvalSymlinks(path)
	if err != nil { // dangling or cyclic: there is no target to name
		target = path
	} else if info, err := os.Stat(target); err == nil {
		e.Type, e.Mode = typeOf(info.Mode()), uint32(info.Mode().Perm())
	}
	target = text(target)
	e.SymlinkTarget = &target
}

func typeOf(mode fs.FileMode) rpc.FileType {
	switch {
	case mode.IsRegular():
		return rpc.FileType_FILE_TYPE_FILE
	case mode.IsDir():
		return rpc.FileType_FILE_TYPE_DIRECTORY
	case mode&fs.ModeSymlink != 0:
		return rpc.FileType_FILE_TYPE_SYMLINK
	}
	return rpc.FileType_FILE_TYPE_UNSPECIFIED
}

// text makes a file name, which may hold any bytes, fit for a message.
func text(name string) string { return strings.ToValidUTF8(name, "\uFFFD") }
