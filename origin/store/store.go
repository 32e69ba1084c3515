// Package store keeps blobs on a local disk: whole ones by digest, partial ones by pieces, upload sessions, write-back
// markers and name records. Origin and agent use it. What it has acknowledged survives kill -9 and power loss;
// everything else is found and dropped, or resumed, at the next Open. It talks to no network (its role serves
// AdminRoutes and ControlRoutes) and knows no swarm.
package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/disk"
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

// SizeUnknown stands for the size of a blob that nobody has said.
const SizeUnknown = -1

// AtEnd is the offset of bytes that are appended wherever a session stands.
const AtEnd = -1

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
	// Volatile says that no blob in the store is the only copy: commits don't wait for the disk. After a crash of the
	// machine the latest are gone, and none is wrong. RunSync must run.
	Volatile bool
	// OnEvict is told of each blob that made room for others, or was found rotten, without the store's lock. May be
	// nil.
	OnEvict func(digest.Digest)
	// OnRotten is told of each blob whose bytes were found to be wrong, after OnEvict. What it owes stays owed. May be
	// nil.
	OnRotten func(digest.Digest)
	Logger   *slog.Logger
	// OpenFS opens Dir; nil is the operating system's file system.
	OpenFS func(dir string) (FS, error)

	beforeScan func() // of tests
}

// Store is a directory of blobs. It is safe for concurrent use.
type Store struct {
	cfg  Config
	log  *slog.Logger
	root FS
	ups  FS // the folder of upload sessions: what is done there needs no walk to it
	lock *os.File

	mu       sync.Mutex
	entries  map[digest.Digest]*entry
	uploads  map[string]*Upload
	partials map[digest.Digest]*Partial
	claims   map[string]chan struct{} // paths that somebody writes without the lock; closed when that is over
	shards   map[string]bool          // folders above those of blobs that are durable
	pins     map[digest.Digest]pin
	names    map[string]struct{}    // keys of the name records
	debts    map[digest.Digest]debt // without bytes
	paid     map[digest.Digest]Paid
	used     int64    // bytes that blobs, partial blobs and uploads take on disk
	leaving  int64    // bytes beside these, of blobs that are being removed
	retryAt  int64    // value of used up to which a fruitless eviction is not tried again
	evicting bool     // somebody chooses what to evict
	victims  []victim // what was chosen
	removing bool     // removeVictims is running
	freed    Signal   // room was made, or evicting ends

	sessions sessionCounts
	writers  atomic.Int64 // sessions that are being written

	evictedSessions atomic.Int64 // that made room for others' sessions
	disk            int64        // size of the file system in bytes
	mount           string       // where the file system is mounted
	refused         atomic.Int64 // when something last found no room, in nanoseconds of Unix time

	// The file system's slow calls; tests have slower ones. None is made with mu.
	avail     func() (int64, error) // bytes that are free
	removeAll func(name string) error
	fsync     func(*os.File) error

	doubts doubts
	scan   scanState
	scrub  scrubState
	lost   atomic.Int64 // blobs whose file was removed or changed by others

	ctx  context.Context // of the scan, and of who waits for room; ends with Close
	stop context.CancelFunc
	work sync.WaitGroup // scan and removal

	closed bool // under mu: no work is begun any more

	dirty     atomic.Bool // a volatile store has something to sync
	tornSince time.Time   // see findTorn
}

// entry is a whole blob.
type entry struct {
	size   int64
	disk   int64 // bytes that its folder takes
	access time.Time
	open   int // readers that keep it from being evicted
	marked bool

	yielding int     // readers that don't
	marker   *Marker // nil when it is not marked, or could not be read
}

// debt is what a marked blob owes once its bytes are gone.
func (e *entry) debt() debt {
	x := debt{Size: e.size}
	if e.marker != nil {
		x.Marker = *e.marker
	}
	return x
}

// Info describes a whole blob.
type Info struct {
	Digest digest.Digest
	Size   int64
}

// Open opens or creates the store in cfg.Dir. It finds name records, pins and upload sessions; the blobs are found in
// the background (see Scanned), and looked for on the disk when somebody asks for one that was not found yet. No blob
// is read.
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
		claims: map[string]chan struct{}{}, shards: map[string]bool{}, names: map[string]struct{}{}, debts: map[digest.Digest]debt{}, paid: map[digest.Digest]Paid{}}
	s.scrub.now = make(chan struct{}, 1)
	s.sessions.sources = map[string]held{}
	if s.lock, err = os.OpenFile(filepath.Join(cfg.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	defer func() {
		if err != nil {
			s.lock.Close()
			for _, r := range []FS{s.root, s.ups} {
				if r != nil {
					r.Close()
				}
			}
		}
	}()
	if err := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, fmt.Errorf("open store %s: %w: end it, or configure another directory", cfg.Dir, ErrLocked)
	}
	if cfg.OpenFS == nil {
		cfg.OpenFS = openFolder
	}
	root, err := cfg.OpenFS(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s.root, s.mount = roomy{root, s}, disk.Mount(cfg.Dir)
	s.avail, s.fsync, s.removeAll = s.free, s.root.Sync, s.root.RemoveAll
	if _, s.disk, err = s.root.Space(); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := s.prepare(); err != nil {
		return nil, fmt.Errorf("open store %s: %w", cfg.Dir, err)
	}
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.scan.done, s.scan.seen = make(chan struct{}), map[digest.Digest]struct{}{}
	s.scan.running.Store(true)
	s.work.Go(func() {
		if cfg.beforeScan != nil {
			cfg.beforeScan()
		}
		s.runScan(s.ctx)
	})
	return s, nil
}

// prepare makes the folders and finds what is small.
func (s *Store) prepare() (err error) {
	if err := s.checkFormat(); err != nil {
		return err
	}
	for _, d := range []string{"blobs", "uploads", "names", "pins", "debts", "paid"} {
		if err := s.root.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	if s.ups, err = s.root.Sub("uploads"); err != nil {
		return err
	}
	// What the process before has made visible, and did not come to sync, counts from here on: others go by it.
	folders := []string{".", "blobs", "names", "pins", "debts", "paid"}
	algorithms, err := fs.ReadDir(s.root.FS(), "blobs")
	if err != nil {
		return err
	}
	for _, a := range algorithms {
		if a.IsDir() {
			folders = append(folders, path.Join("blobs", a.Name()))
		}
	}
	for _, d := range folders {
		if err := s.syncDir(d); err != nil {
			return err
		}
	}
	return errors.Join(s.findTorn(), s.scanUploads(), s.scanNames(), s.scanPins(), s.scanDebts(), s.scanPaid())
}

// checkFormat refuses a newer layout. There is no older one to migrate from yet.
func (s *Store) checkFormat() error {
	b, err := s.root.ReadFile("format")
	if errors.Is(err, fs.ErrNotExist) {
		return s.writeFile("format", fmt.Appendf(nil, "%s%d\n", formatPrefix, Format))
	}
	if err != nil {
		return err
	}
	var v int
	if _, err := fmt.Sscanf(string(b), formatPrefix+"%d\n", &v); err != nil || v < 1 {
		return fmt.Errorf("file format says %.40q, want %q: this is no store of Kraken", b, fmt.Sprint(formatPrefix, Format))
	}
	if v > Format {
		return fmt.Errorf("%w: format %d, this program knows up to %d: start a newer one, or give it an empty directory", ErrNewerFormat, v, Format)
	}
	return nil
}

// closeWait is how long Close waits for one call of the file system that was begun, of the scan or of a removal.
const closeWait = 10 * time.Second

// Close ends the use of the directory. Partial blobs are flushed; open readers stay valid. What was evicted and is not
// removed yet stays on the disk, and the next start finds it.
func (s *Store) Close() error {
	s.stop()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.waitWork()
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

// waitWork waits for the scan and the removal, which have been told to end, and gives up on a disk that hangs.
func (s *Store) waitWork() {
	ended := make(chan struct{})
	go func() {
		s.work.Wait()
		close(ended)
	}()
	t := time.NewTimer(closeWait)
	defer t.Stop()
	select {
	case <-ended:
	case <-t.C:
		s.log.Error("the disk hangs: the store is closed while a removal or the scan still waits for it", "dir", s.cfg.Dir, "after", closeWait)
	}
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
