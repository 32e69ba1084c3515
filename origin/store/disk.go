package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
)

// Nothing in this file is called with the store's lock: a disk may take seconds to sync or to remove. A claim of the
// path that is changed keeps others from it meanwhile.

// claim waits until nobody else has a path claimed, and claims it. Claims are taken in the order scan, blob's folder,
// folder above, doubts; no lock is held.
func (s *Store) claim(name string) (release func()) {
	mine := make(chan struct{})
	for {
		s.mu.Lock()
		other, taken := s.claims[name]
		if !taken {
			s.claims[name] = mine
			s.mu.Unlock()
			return func() { s.release(name) }
		}
		s.mu.Unlock()
		<-other
	}
}

// tryClaim claims a path that nobody else has claimed. Whoever has a claim already may call it.
func (s *Store) tryClaim(name string) (release func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, taken := s.claims[name]; taken {
		return nil, false
	}
	s.claims[name] = make(chan struct{})
	return func() { s.release(name) }, true
}

// release ends a claim.
func (s *Store) release(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ch := s.claims[name]
	delete(s.claims, name)
	close(ch)
}

// makeBlobDir makes the directory of d and what is above it, durably.
func (s *Store) makeBlobDir(d digest.Digest) error {
	dir := blobDir(d)
	if _, err := s.root.Stat(dir); err == nil {
		return s.settle()
	}
	if err := s.makeShard(d); err != nil {
		return err
	}
	if err := s.root.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return s.syncDir(path.Dir(dir))
}

// makeShard makes the folder above that of d, durably. Each is synced once in the life of a process: that it exists
// does not say that the process before came to sync it.
func (s *Store) makeShard(d digest.Digest) error {
	shard := path.Dir(blobDir(d))
	if s.hasShard(shard) {
		return nil
	}
	defer s.claim(shard)()
	if s.hasShard(shard) {
		return nil
	}
	if err := s.root.MkdirAll(shard, 0o700); err != nil {
		return err
	}
	for p := path.Dir(shard); p != "."; p = path.Dir(p) {
		if err := s.syncDir(p); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shards[shard] = true
	return nil
}

func (s *Store) hasShard(shard string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shards[shard]
}

// syncDir makes the names in a folder durable. Where that fails, what was to be made durable can be seen all the same:
// see doubts.
func (s *Store) syncDir(name string) error {
	if s.cfg.Volatile {
		s.dirty.Store(true)
		return nil
	}
	f, err := s.root.Open(name)
	if err == nil {
		err = errors.Join(s.fsync(f), f.Close())
	}
	if err != nil {
		s.doubts.made.Add(1)
	}
	return err
}

// doubts counts the syncs of folders that have failed: what is seen on the disk since may go with the power. So nobody
// is told "it is there already" before settle.
type doubts struct{ made, settled atomic.Int64 }

// settle makes all that can be seen on the disk durable, where that is in doubt. It comes before each answer that goes
// by what the disk has and not by what this process has synced.
func (s *Store) settle() error {
	if s.doubts.settled.Load() == s.doubts.made.Load() {
		return nil
	}
	defer s.claim("doubts")()
	made := s.doubts.made.Load()
	if s.doubts.settled.Load() == made {
		return nil
	}
	if err := s.root.SyncAll(); err != nil {
		return fmt.Errorf("sync %s: %w", s.cfg.Dir, err)
	}
	s.doubts.settled.Store(made)
	return nil
}

// writeFile replaces a small file durably: fsync, rename, fsync of the directory. In a volatile store the next syncAll
// makes it durable.
func (s *Store) writeFile(name string, b []byte) error {
	if err := s.replaceFile(name, b, s.syncFile); err != nil {
		return err
	}
	return s.syncDir(path.Dir(name))
}

// replaceFile is writeFile without the last step, by the sync that it is given: after a crash the file may still be the
// old one.
func (s *Store) replaceFile(name string, b []byte, sync func(*os.File) error) error {
	tmp := name + ".new"
	f, err := s.root.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = s.noRoom(err); err == nil {
		err = sync(f)
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = s.root.Rename(tmp, name)
	}
	if err != nil { // on a full disk what is left of it would be in the way of others
		err = errors.Join(err, s.remove(tmp))
	}
	return err
}

// remove deletes a file; one that is not there is fine.
func (s *Store) remove(name string) error {
	if err := s.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (s *Store) has(d digest.Digest, name string) bool {
	_, err := s.root.Stat(blobFile(d, name))
	return err == nil
}
