// Package store keeps blobs on a local disk: whole ones by digest, partial ones by pieces, upload sessions, write-back markers
// and name records. Origin and agent use it. What it has acknowledged survives kill -9 and power loss; everything else is found
// and dropped, or resumed, at the next Open. It talks to no network (its role serves AdminRoutes and ControlRoutes) and knows no swarm.
package store

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
)

// Errors of this package.
var (
	ErrNotFound       = errors.New("not in the store")
	ErrDigestMismatch = errors.New("content does not match its digest")
	ErrSizeMismatch   = errors.New("content does not have its size")
	ErrUploadUnknown  = errors.New("no such upload session")
	ErrFull           = errors.New("no space left in the store")
	ErrNewerFormat    = errors.New("store was written by a newer version")
	ErrBusy           = errors.New("in use by another writer")
	ErrLocked         = errors.New("store is in use by another process")
	ErrMarked         = errors.New("blob is not written back yet")
)

// Format is the version of the layout on disk.
const Format = 1

const formatPrefix = "kraken-store "

// Config configures a Store.
type Config struct {
	Dir      string // only this process may use it
	Capacity int64  // bytes that blobs and uploads may take on disk, 0 is unbounded
	Keep
	// Sessions bounds upload sessions; its zero value does not.
	Sessions Sessions
	// Volatile says that no blob in the store is the only copy: commits don't wait for the disk. After a crash of the machine the latest are
	// gone, and none is wrong. RunSync must run.
	Volatile bool
	// OnEvict is told of each blob that made room for others, or was found rotten, without the store's lock. May be nil.
	OnEvict func(digest.Digest)
	Logger  *slog.Logger
}

// Store is a directory of blobs. It is safe for concurrent use.
type Store struct {
	cfg  Config
	log  *slog.Logger
	root *os.Root
	ups  *os.Root // the folder of upload sessions: what is done there needs no walk to it
	lock *os.File

	mu       sync.Mutex
	entries  map[digest.Digest]*entry
	uploads  map[string]*Upload
	partials map[digest.Digest]*Partial
	claims   map[string]chan struct{} // paths that somebody writes without the lock; closed when that is over
	shards   map[string]bool          // folders above those of blobs that are durable
	pins     map[digest.Digest]bool   // true: by configuration
	used     int64                    // bytes that blobs, partial blobs and uploads take on disk
	retryAt  int64                    // value of used up to which a fruitless eviction is not tried again

	sessions sessionCounts
	writers  atomic.Int64 // sessions that are being written
	disk     int64        // size of the file system in bytes

	avail func() (int64, error) // bytes that are free on the file system; tests have another
	scrub scrubState

	dirty     atomic.Bool // a volatile store has something to sync
	tornSince time.Time   // see findTorn
}

// entry is a whole blob.
type entry struct {
	size   int64
	disk   int64 // bytes that its folder takes
	access time.Time
	open   int // readers and writers that keep it from being evicted
	marked bool
}

// Info describes a whole blob.
type Info struct {
	Digest digest.Digest
	Size   int64
}

// Open opens or creates the store in cfg.Dir and finds what is there; it reads no blob.
func Open(cfg Config) (_ *Store, err error) {
	if cfg.Dir == "" {
		return nil, errors.New("open store: no directory is configured")
	}
	if cfg.Capacity < 0 {
		return nil, errors.New("open store: the capacity is negative")
	}
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s := &Store{cfg: cfg, log: cfg.Logger, entries: map[digest.Digest]*entry{}, uploads: map[string]*Upload{}, partials: map[digest.Digest]*Partial{},
		claims: map[string]chan struct{}{}, shards: map[string]bool{}}
	s.sessions.sources = map[string]held{}
	s.avail, s.scrub.now = s.statfs, make(chan struct{}, 1)
	if s.lock, err = os.OpenFile(filepath.Join(cfg.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	defer func() {
		if err != nil {
			s.lock.Close()
			for _, r := range []*os.Root{s.root, s.ups} {
				if r != nil {
					r.Close()
				}
			}
		}
	}()
	if err := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, fmt.Errorf("open store %s: %w: end it, or configure another directory", cfg.Dir, ErrLocked)
	}
	if s.disk, err = s.fileSystem(); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if s.root, err = os.OpenRoot(cfg.Dir); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := s.checkFormat(); err != nil {
		return nil, err
	}
	for _, d := range []string{"blobs", "uploads", "names", "pins"} {
		if err := s.root.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("open store: %w", err)
		}
	}
	if s.ups, err = s.root.OpenRoot("uploads"); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := s.syncDir("."); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := s.findTorn(); err != nil {
		return nil, fmt.Errorf("open store %s: %w", cfg.Dir, err)
	}
	if err := errors.Join(s.scan(), s.scanPins()); err != nil {
		return nil, fmt.Errorf("open store %s: %w", cfg.Dir, err)
	}
	if _, err := s.root.Stat(fileSynced); cfg.Volatile || err == nil {
		if err := s.syncAll(); err != nil {
			return nil, fmt.Errorf("open store: %w", err)
		}
	}
	return s, nil
}

// checkFormat refuses a newer layout. There is no older one to migrate from yet.
func (s *Store) checkFormat() error {
	b, err := s.root.ReadFile("format")
	if errors.Is(err, fs.ErrNotExist) {
		return s.writeFile("format", fmt.Appendf(nil, "%s%d\n", formatPrefix, Format))
	}
	if err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	var v int
	if _, err := fmt.Sscanf(string(b), formatPrefix+"%d\n", &v); err != nil || v < 1 {
		return fmt.Errorf("open store %s: file format says %.40q, want %q: this is no store of Kraken", s.cfg.Dir, b, fmt.Sprint(formatPrefix, Format))
	}
	if v > Format {
		return fmt.Errorf("open store %s: %w: format %d, this program knows up to %d: start a newer one, or give it an empty directory", s.cfg.Dir, ErrNewerFormat, v, Format)
	}
	return nil
}

// Close ends the use of the directory. Partial blobs are flushed; open readers stay valid.
func (s *Store) Close() error {
	s.mu.Lock()
	parts := make([]*Partial, 0, len(s.partials))
	for _, p := range s.partials {
		parts = append(parts, p)
	}
	ups := make([]*Upload, 0, len(s.uploads))
	for _, u := range s.uploads {
		ups = append(ups, u)
	}
	s.mu.Unlock()
	var errs []error
	for _, p := range parts {
		errs = append(errs, p.Flush())
	}
	for _, u := range ups {
		u.closeFile()
	}
	if s.cfg.Volatile {
		errs = append(errs, s.syncAll())
	}
	return errors.Join(append(errs, s.ups.Close(), s.root.Close(), s.lock.Close())...)
}

// blobDir is where a digest's files are. Digests are validated, so the path can't leave the store.
func blobDir(d digest.Digest) string {
	h := d.Encoded()
	return path.Join("blobs", d.Algorithm().String(), h[:2], h)
}

const (
	fileData     = "data"
	fileMetainfo = "metainfo"
	filePieces   = "pieces"
	fileMarker   = "writeback"
	fileSession  = "session" // of an upload; in a blob's folder for the moment between the commit and its removal
)

func blobFile(d digest.Digest, name string) string { return path.Join(blobDir(d), name) }

// makeBlobDir makes the directory of d and what is above it, durably.
func (s *Store) makeBlobDir(d digest.Digest) error {
	dir := blobDir(d)
	if _, err := s.root.Stat(dir); err == nil {
		return nil
	}
	if err := s.makeShard(d); err != nil {
		return err
	}
	if err := s.root.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return s.syncDir(path.Dir(dir))
}

// makeShard makes the folder above that of d, durably. Each is synced once in the life of a process: that it exists does not say that
// the process before came to sync it. The lock is held.
func (s *Store) makeShard(d digest.Digest) error {
	shard := path.Dir(blobDir(d))
	if s.shards[shard] {
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
	s.shards[shard] = true
	return nil
}

// claim waits until nobody else has a path claimed, and claims it. It keeps the lock free while the disk is waited for.
func (s *Store) claim(name string) (release func()) {
	mine := make(chan struct{})
	for {
		s.mu.Lock()
		other, taken := s.claims[name]
		if !taken {
			s.claims[name] = mine
			s.mu.Unlock()
			return func() {
				s.mu.Lock()
				delete(s.claims, name)
				s.mu.Unlock()
				close(mine)
			}
		}
		s.mu.Unlock()
		<-other
	}
}

// taken says that d is whole, opened as a partial blob, or about to become one of these. The lock is held.
func (s *Store) taken(d digest.Digest) bool {
	_, claimed := s.claims[blobDir(d)]
	return claimed || s.partials[d] != nil || s.entries[d] != nil
}

func (s *Store) syncDir(name string) error {
	if s.cfg.Volatile {
		s.dirty.Store(true)
		return nil
	}
	f, err := s.root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// writeFile replaces a small file durably: fsync, rename, fsync of the directory.
func (s *Store) writeFile(name string, b []byte) error {
	if err := s.replaceFile(name, b); err != nil {
		return err
	}
	return s.syncDir(path.Dir(name))
}

// replaceFile is writeFile without the last step: after a crash the file may still be the old one.
func (s *Store) replaceFile(name string, b []byte) error {
	tmp := name + ".new"
	f, err := s.root.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = s.root.Rename(tmp, name)
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

// scan finds blobs and uploads. What a crash left half made is removed.
func (s *Store) scan() error {
	err := fs.WalkDir(s.root.FS(), "blobs", func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		parts := strings.Split(p, "/")
		if !e.IsDir() || len(parts) != 4 {
			return nil
		}
		d, err := blob.ParseDigest(parts[1] + ":" + parts[3])
		if err != nil {
			s.log.Warn("a foreign folder in the store is left alone", "path", p)
			return fs.SkipDir
		}
		if err := s.scanBlob(d); err != nil {
			return err
		}
		return fs.SkipDir
	})
	if err != nil {
		return err
	}
	return s.scanUploads()
}

func (s *Store) scanBlob(d digest.Digest) error {
	fi, err := s.root.Stat(blobFile(d, fileData))
	if errors.Is(err, fs.ErrNotExist) {
		// A marker without data: the crash came between the two, the push was not acknowledged.
		return s.root.RemoveAll(blobDir(d))
	}
	if err != nil {
		return err
	}
	if s.has(d, filePieces) {
		s.used += occupied(fi)
		return nil // partial; opened when somebody wants it
	}
	if err := s.remove(blobFile(d, fileSession)); err != nil { // the crash came right after the commit
		return err
	}
	if s.torn(d, fi) {
		s.log.Warn("a blob that a crash of the machine may have torn is removed", "digest", d)
		return s.root.RemoveAll(blobDir(d))
	}
	disk, err := s.footprint(d)
	if err != nil {
		return err
	}
	s.used += disk
	s.entries[d] = &entry{size: fi.Size(), disk: disk, access: fi.ModTime(), marked: s.has(d, fileMarker)}
	return nil
}

func (s *Store) has(d digest.Digest, name string) bool {
	_, err := s.root.Stat(blobFile(d, name))
	return err == nil
}
