package sqlite

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// reserved is the room that the database's log has set aside, in bytes. Sandboxes
// can fill the disk that the database is on, and what makes room again, ending
// one, has to be recorded first: that takes some 95 KB of the log. The log starts
// over after 4 MB, unless the database is to grow and cannot.
const reserved = 32 << 20

// reservedIndex is the same for the log's index: it takes 8 bytes for each 4 KB of
// the log, in steps of 32 KB.
const reservedIndex = 128 << 10

// reserve allocates the room beyond the ends of the log and its index, where SQLite
// does not see it but its writes find it. A file system that cannot do that, or has
// not got as much left, leaves things as they were. The database itself gets none:
// SQLite gives it back with every checkpoint. The file that is returned, if any, is
// to be closed after the database: closing it drops this process's locks on the
// index, which is where SQLite has them.
func reserve(database string) (index *os.File, err error) {
	log, err := allocate(database+"-wal", reserved)
	if err != nil {
		return nil, err
	}
	if log != nil {
		log.Close()
	}
	return allocate(database+"-shm", reservedIndex)
}

func allocate(path string, size int64) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reserve room for database: %w", err)
	}
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, size)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		f.Close()
		return nil, fmt.Errorf("reserve room for database: %w", err)
	}
	return f, nil
}
