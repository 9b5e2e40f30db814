package main

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// addFiles serves what the suite asks of the guest's files: POST /file with op
// and path, and what else the operation takes; GET /stat.
func addFiles(mux *http.ServeMux) {
	mux.HandleFunc("POST /file", func(w http.ResponseWriter, r *http.Request) {
		path, to := r.FormValue("path"), r.FormValue("to")
		mode, _ := strconv.ParseUint(r.FormValue("mode"), 8, 32)
		switch op := r.FormValue("op"); op {
		case "remove":
			answer(w, os.RemoveAll(path))
		case "mkdir":
			answer(w, os.Mkdir(path, os.FileMode(mode)))
		case "chmod":
			answer(w, unix.Chmod(path, uint32(mode)))
		case "chown":
			answer(w, os.Lchown(path, number(r, "uid"), number(r, "gid")))
		case "symlink":
			answer(w, os.Symlink(to, path))
		case "link":
			answer(w, os.Link(to, path))
		case "rename":
			answer(w, os.Rename(path, to))
		case "fifo":
			answer(w, unix.Mkfifo(path, uint32(mode)))
		case "touch":
			at := unix.Timespec{Sec: int64(number(r, "at")), Nsec: 5}
			answer(w, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{at, at}, 0))
		case "write":
			answer(w, os.WriteFile(path, []byte(to), 0o600))
		case "many":
			answer(w, writeMany(path, number(r, "n")))
		case "sparse":
			f, err := os.Create(path)
			if err == nil {
				_, err = f.WriteAt([]byte("end"), 1<<30)
				f.Close()
			}
			answer(w, err)
		case "setxattr":
			answer(w, unix.Setxattr(path, "user.test", []byte(to), 0))
		default:
			http.Error(w, "no operation "+op, http.StatusNotFound)
		}
	})
	mux.HandleFunc("GET /stat", stat)
}

// writeMany makes a directory of n small files.
func writeMany(dir string, n int) error {
	err := os.Mkdir(dir, 0o755)
	for i := 0; i < n && err == nil; i++ {
		err = os.WriteFile(filepath.Join(dir, strconv.Itoa(i)), []byte("x"), 0o600)
	}
	return err
}

// stat answers what the file system says of path, or "gone".
func stat(w http.ResponseWriter, r *http.Request) {
	path := r.FormValue("path")
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		fmt.Fprint(w, "gone")
		return
	}
	fmt.Fprintf(w, "%o %d:%d links %d", st.Mode, st.Uid, st.Gid, st.Nlink)
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		fmt.Fprintf(w, " size %d", st.Size)
	}
	if r.FormValue("time") != "" {
		fmt.Fprintf(w, " changed %d", st.Mtim.Sec)
	}
	if to, err := os.Readlink(path); err == nil {
		fmt.Fprintf(w, " to %s", to)
	}
	value := make([]byte, 100)
	if n, err := unix.Lgetxattr(path, "user.test", value); err == nil {
		fmt.Fprintf(w, " test=%s", value[:n])
	}
}
