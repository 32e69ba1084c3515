package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"time"

	"kraken/proto/disk"
)

// roomy is an FS whose errors are ErrFull where the file system has no room left, whatever the call. Writes to files
// that are open don't go through it: they call noRoom themselves.
type roomy struct {
	calls
	s *Store
}

// calls is FS by a name that its method FS does not have.
type calls FS

func (r roomy) OpenFile(name string, flag int, perm fs.FileMode) (*os.File, error) {
	f, err := r.calls.OpenFile(name, flag, perm)
	return f, r.s.noRoom(err)
}

func (r roomy) WriteFile(name string, b []byte, perm fs.FileMode) error {
	return r.s.noRoom(r.calls.WriteFile(name, b, perm))
}

func (r roomy) Mkdir(name string, perm fs.FileMode) error {
	return r.s.noRoom(r.calls.Mkdir(name, perm))
}

func (r roomy) MkdirAll(name string, perm fs.FileMode) error {
	return r.s.noRoom(r.calls.MkdirAll(name, perm))
}

func (r roomy) Rename(oldName, newName string) error {
	return r.s.noRoom(r.calls.Rename(oldName, newName))
}

func (r roomy) Sync(f *os.File) error { return r.s.noRoom(r.calls.Sync(f)) }

func (r roomy) SyncAll() error { return r.s.noRoom(r.calls.SyncAll()) }

func (r roomy) Sub(name string) (FS, error) {
	sub, err := r.calls.Sub(name)
	if err != nil {
		return nil, err
	}
	return roomy{sub, r.s}, nil
}

// noRoom returns err as ErrFull, with the file system and its free bytes, where err says that there is no room left.
func (s *Store) noRoom(err error) error {
	if err == nil || !disk.Full(err) || errors.Is(err, ErrFull) {
		return err
	}
	return s.full(err)
}

// full is why as ErrFull, with the file system and its free bytes.
func (s *Store) full(why error) error {
	s.refused.Store(time.Now().UnixNano())
	err := fmt.Errorf("%w: %w", ErrFull, why)
	space, serr := s.Space()
	if serr != nil {
		return err
	}
	return &disk.FullError{Space: space, Err: err}
}

// fullFor is that n bytes more have no room.
func (s *Store) fullFor(n int64) error {
	s.mu.Lock()
	used := s.used
	s.mu.Unlock()
	return s.full(fmt.Errorf("%d bytes more are needed, %d are taken by what is open, pinned, partial or not written back (capacity %d, min_free %d)",
		n, used, s.cfg.Capacity, s.cfg.MinFree))
}

// Space is what the store's file system has left.
func (s *Store) Space() (disk.Space, error) {
	free, err := s.avail()
	return disk.Space{Dir: s.mount, Free: free, Size: s.disk}, err
}

// refusedFor is for how long readiness tells that something found no room.
const refusedFor = 30 * time.Second

// CheckSpace is what readiness says of the disk: that the file system is full, or nearly, or that something found no
// room lately, whether in the file system or in the capacity.
func (s *Store) CheckSpace(context.Context) error {
	space, err := s.Space()
	if err != nil {
		return fmt.Errorf("free space is not known: %w", err)
	}
	if err := space.Check(); err != nil {
		return err
	}
	if time.Since(time.Unix(0, s.refused.Load())) > refusedFor {
		return nil
	}
	used, capacity := s.Usage()
	return &disk.FullError{Space: space, Err: fmt.Errorf("there was no room for what was to be written lately: %d bytes are used, capacity %d, min_free %d", used, capacity, s.cfg.MinFree)}
}

// folderRoom is what the folder of a session and its small files take, in bytes.
const folderRoom = 16 << 10

// makeFolderRoom evicts what is least recently used where the file system could not take another session's folder:
// reserve is not asked before the first byte comes.
func (s *Store) makeFolderRoom() error {
	if s.available() >= folderRoom+int64(s.cfg.MinFree) {
		return nil
	}
	if err := s.reserve(folderRoom); err != nil {
		return err
	}
	s.unreserve(folderRoom)
	return nil
}

// free is what others than root may still write to the store's file system.
func (s *Store) free() (int64, error) {
	free, _, err := s.root.Space()
	return free, err
}

// available is what may still be written to the file system, a very large number when that is not known.
func (s *Store) available() int64 {
	n, err := s.avail()
	if err != nil {
		s.log.Warn("free space is not known", "error", err)
		return math.MaxInt64
	}
	return n
}
