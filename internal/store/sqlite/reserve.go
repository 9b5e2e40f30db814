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
// one, has to be recorded first: that takes some 70 KB of the log. The log starts
// over after 4 MB, unless the database is to grow and cannot.
const reserved = 32 << 20

// reserve allocates the room beyond the log's end, where SQLite does not see it
// but its writes find it. A file system that cannot do that, or has not got as
// much left, leaves things as they were. The database itself gets none: SQLite
// gives it back with every checkpoint.
func reserve(log string) error {
	f, err := os.OpenFile(log, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reserve room for database: %w", err)
	}
	defer f.Close() // SQLite keeps no locks on this file that would go with it
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, reserved)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("reserve room for database: %w", err)
	}
	return nil
}
