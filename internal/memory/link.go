package memory

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// LinkTo makes the image one of the directory dir as well, which is made, for as long
// as nobody else may be trusted to keep it: as the parent of what comes next. It
// takes no room, and is not synced: the copy ends with its reader.
func (img *Image) LinkTo(dir string) error {
	if err := img.linkTo(dir); err != nil {
		return fmt.Errorf("link memory image: %w", full(err))
	}
	return nil
}

func (img *Image) linkTo(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for _, l := range img.layers {
		if _, err := linkLayer(l, dir); err != nil {
			return err
		}
	}
	return img.linkHeader(dir)
}

func (img *Image) linkHeader(dir string) error {
	err := os.Link(filepath.Join(img.dir, HeaderName), filepath.Join(dir, HeaderName))
	if errors.Is(err, unix.EXDEV) || errors.Is(err, os.ErrNotExist) { // the image may have been removed since
		return os.WriteFile(filepath.Join(dir, HeaderName), img.encode(), 0o600)
	}
	return err
}
