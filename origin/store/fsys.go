package store

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// FS is all that a store does with its folder, except for reading and writing files that are open: those are *os.File,
// so that sendfile works and a read costs nothing more. Names are relative to the folder. Nil in Config is the
// operating system; a test has one that forgets, at a crash, what was not synced.
type FS interface {
	Open(name string) (*os.File, error)
	OpenFile(name string, flag int, perm fs.FileMode) (*os.File, error)
	ReadFile(name string) ([]byte, error)
	WriteFile(name string, b []byte, perm fs.FileMode) error
	Stat(name string) (fs.FileInfo, error)
	Chtimes(name string, access, modified time.Time) error
	Mkdir(name string, perm fs.FileMode) error
	MkdirAll(name string, perm fs.FileMode) error
	// Rename replaces a file, and fails with fs.ErrExist where newName is a folder that is not empty.
	Rename(oldName, newName string) error
	Remove(name string) error
	RemoveAll(name string) error
	// FS lists folders.
	FS() fs.FS
	// Sub is a folder in this one, which need not be walked to any more. It is closed by itself.
	Sub(name string) (FS, error)
	// Sync makes an open file's content durable, or an open folder's names.
	Sync(f *os.File) error
	// SyncAll makes everything durable that is there.
	SyncAll() error
	// Boot tells one run of the machine from another; empty where that is not known.
	Boot() string
	// Space returns what others than root may still write, and the size of the file system, in bytes.
	Space() (free, size int64, err error)
	Close() error
}

// folder is FS by the operating system.
type folder struct {
	*os.Root
	top *os.File // the store's folder, in folders below it, too
	sub bool
}

func openFolder(dir string) (FS, error) {
	r, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	top, err := r.Open(".")
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return folder{r, top, false}, nil
}

func (f folder) Sub(name string) (FS, error) {
	r, err := f.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	return folder{r, f.top, true}, nil
}

func (folder) Sync(f *os.File) error { return f.Sync() }

func (f folder) SyncAll() error { return unix.Syncfs(int(f.top.Fd())) }

func (folder) Boot() string { return bootID() }

func (f folder) Space() (free, size int64, err error) {
	var st syscall.Statfs_t
	if err := syscall.Fstatfs(int(f.top.Fd()), &st); err != nil {
		return 0, 0, fmt.Errorf("free space of %s: %w", f.top.Name(), err)
	}
	bytes := func(blocks uint64) int64 { return int64(min(blocks, math.MaxInt64/uint64(st.Bsize))) * st.Bsize }
	return bytes(st.Bavail), bytes(st.Blocks), nil
}

func (f folder) Close() error {
	if f.sub {
		return f.Root.Close()
	}
	return errors.Join(f.Root.Close(), f.top.Close())
}
