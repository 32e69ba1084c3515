package sim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"kraken/origin/store"
)

// open is store.Config.OpenFS for one process.
func (d *disk) open(p *process) func(dir string) (store.FS, error) {
	return func(dir string) (store.FS, error) {
		root, err := os.OpenRoot(dir)
		if err != nil {
			return nil, err
		}
		return &fileSystem{d, p, root, "."}, nil
	}
}

// fileSystem is a disk as a process sees it.
type fileSystem struct {
	d    *disk
	p    *process
	root *os.Root
	dir  string // of root below the disk's
}

var (
	errCrashed = errors.New("the machine has crashed")
	errIO      = errors.New("input/output error")
)

// step is the time that one call takes, and the moment at which it may be the last one.
func (f *fileSystem) step(sync bool) error {
	f.d.mu.Lock()
	f.d.calls++
	crashed, failed := f.d.crashAt > 0 && f.d.calls >= f.d.crashAt, f.d.calls == f.d.failAt
	t := time.Duration(f.d.rnd.IntN(200)) * time.Microsecond
	if sync {
		t += f.d.slow + time.Duration(f.d.rnd.IntN(5000))*time.Microsecond
	}
	f.d.mu.Unlock()
	switch {
	case crashed:
		return errCrashed
	case failed:
		return errIO
	}
	return f.p.sleep(context.Background(), t)
}

func (f *fileSystem) name(n string) string { return path.Join(f.dir, filepath.ToSlash(n)) }

// Open implements store.FS.
func (f *fileSystem) Open(name string) (*os.File, error) {
	if err := f.p.gate(); err != nil {
		return nil, err
	}
	return f.root.Open(name)
}

// OpenFile implements store.FS.
func (f *fileSystem) OpenFile(name string, flag int, perm fs.FileMode) (*os.File, error) {
	if flag&(os.O_CREATE|os.O_TRUNC) != 0 {
		if err := f.step(false); err != nil {
			return nil, err
		}
	} else if err := f.p.gate(); err != nil {
		return nil, err
	}
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	file, err := f.root.OpenFile(name, flag, perm)
	if err == nil && flag&os.O_CREATE != 0 {
		err = f.d.created(f.name(name), false)
	}
	return file, err
}

// ReadFile implements store.FS.
func (f *fileSystem) ReadFile(name string) ([]byte, error) {
	if err := f.p.gate(); err != nil {
		return nil, err
	}
	return f.root.ReadFile(name)
}

// WriteFile implements store.FS.
func (f *fileSystem) WriteFile(name string, b []byte, perm fs.FileMode) error {
	file, err := f.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	if err := f.step(false); err != nil { // the file may be there, and empty
		return errors.Join(err, file.Close())
	}
	_, err = file.Write(b)
	return errors.Join(err, file.Close())
}

// Stat implements store.FS.
func (f *fileSystem) Stat(name string) (fs.FileInfo, error) {
	if err := f.p.gate(); err != nil {
		return nil, err
	}
	return f.root.Stat(name)
}

// Chtimes implements store.FS.
func (f *fileSystem) Chtimes(name string, access, modified time.Time) error {
	return f.root.Chtimes(name, access, modified)
}

// change makes one change of names, and notes it.
func (f *fileSystem) change(do func() error, note func() error) error {
	if err := f.step(false); err != nil {
		return err
	}
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := do(); err != nil {
		return err
	}
	return note()
}

// Mkdir implements store.FS.
func (f *fileSystem) Mkdir(name string, perm fs.FileMode) error {
	return f.change(func() error { return f.root.Mkdir(name, perm) }, func() error { return f.d.created(f.name(name), true) })
}

// MkdirAll implements store.FS.
func (f *fileSystem) MkdirAll(name string, perm fs.FileMode) error {
	parts := strings.Split(name, "/")
	for i := range parts {
		if err := f.Mkdir(path.Join(parts[:i+1]...), perm); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// Rename implements store.FS.
func (f *fileSystem) Rename(from, to string) error {
	return f.change(func() error { return f.root.Rename(from, to) }, func() error {
		f.d.renamed(f.name(from), f.name(to))
		return nil
	})
}

// Remove implements store.FS.
func (f *fileSystem) Remove(name string) error {
	if err := f.step(false); err != nil {
		return err
	}
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return f.remove(name)
}

// remove is Remove with the lock.
func (f *fileSystem) remove(name string) error {
	n := f.d.find(f.name(name))
	if n != nil && !(n.folder && len(n.names) > 0) {
		f.d.removed(n)
	}
	return f.root.Remove(name)
}

// RemoveAll implements store.FS. It removes name after name, and a crash may come between.
func (f *fileSystem) RemoveAll(name string) error {
	f.d.mu.Lock()
	n := f.d.find(f.name(name))
	var names []string
	if n != nil && n.folder {
		names = slices.Sorted(maps.Keys(n.names))
	}
	f.d.mu.Unlock()
	for _, k := range names {
		if err := f.RemoveAll(path.Join(name, k)); err != nil {
			return err
		}
	}
	if err := f.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// FS implements store.FS.
func (f *fileSystem) FS() fs.FS { return f.root.FS() }

// Sub implements store.FS.
func (f *fileSystem) Sub(name string) (store.FS, error) {
	if err := f.p.gate(); err != nil {
		return nil, err
	}
	r, err := f.root.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	return &fileSystem{f.d, f.p, r, f.name(name)}, nil
}

// Sync implements store.FS. What is written while it runs may be synced or not.
func (f *fileSystem) Sync(file *os.File) error {
	if err := f.step(true); err != nil {
		return err
	}
	fi, err := file.Stat()
	if err != nil {
		return err
	}
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	n := f.d.byIno[fi.Sys().(*syscall.Stat_t).Ino]
	switch {
	case n == nil:
	case n.folder:
		f.d.syncNames(n)
	default:
		f.d.syncContent(n)
	}
	return nil
}

// syncContent makes a file's content durable. The lock is held.
func (d *disk) syncContent(n *inode) {
	n.content, n.synced = slices.Clone(d.now(n)), true
}

// SyncAll implements store.FS.
func (f *fileSystem) SyncAll() error {
	if err := f.step(true); err != nil {
		return err
	}
	f.d.mu.Lock()
	all := f.d.all
	f.d.mu.Unlock()
	if err := f.p.sleep(context.Background(), all); err != nil {
		return err
	}
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	for _, o := range f.d.ops {
		o.apply()
	}
	f.d.ops = nil
	var walk func(n *inode)
	walk = func(n *inode) {
		for _, c := range n.names {
			if c.folder {
				walk(c)
			} else {
				f.d.syncContent(c)
			}
		}
	}
	walk(f.d.root)
	return nil
}

// Boot implements store.FS.
func (f *fileSystem) Boot() string {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return fmt.Sprintf("boot-%031d", f.d.boots)
}

// Space implements store.FS.
func (f *fileSystem) Space() (free, size int64, err error) { return 1 << 40, 1 << 40, nil }

// Close implements store.FS.
func (f *fileSystem) Close() error { return f.root.Close() }
