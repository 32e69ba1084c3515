package store

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/config"
)

// ErrConfigured is the attempt to change what the configuration says.
var ErrConfigured = errors.New("set by the configuration")

// Keep is what an operator says about keeping blobs; origins and agents have the same keys.
type Keep struct {
	// HighWater is the fraction of the capacity above which blobs are evicted, LowWater the one down to which. Defaults 0.95 and 0.85.
	HighWater float64 `yaml:"high_water"`
	LowWater  float64 `yaml:"low_water"`
	// MinFree is what is to stay free on the file system: blobs are evicted for it, too, and nothing is taken without it.
	MinFree config.Size `yaml:"min_free"`
	// Pinned are digests that are never evicted, beside those that Pin was called for.
	Pinned []digest.Digest `yaml:"pinned"`
	// Scrub is the reading and verifying of what is kept.
	Scrub ScrubConfig `yaml:"scrub"`
}

// Validate fills in defaults and refuses what can't work.
func (k *Keep) Validate() error {
	if k.HighWater == 0 {
		k.HighWater = 0.95
	}
	if k.LowWater == 0 {
		k.LowWater = min(0.85, k.HighWater)
	}
	if !(0 < k.LowWater && k.LowWater <= k.HighWater && k.HighWater <= 1) {
		return fmt.Errorf("low_water %g and high_water %g: want 0 < low_water <= high_water <= 1", k.LowWater, k.HighWater)
	}
	if k.MinFree < 0 {
		return errors.New("min_free must not be negative")
	}
	for _, d := range k.Pinned {
		if _, err := blob.ParseDigest(d.String()); err != nil {
			return fmt.Errorf("pinned: %w", err)
		}
	}
	return k.Scrub.Validate()
}

// occupied is what a partial blob takes on disk: being sparse, less than its size.
func occupied(fi fs.FileInfo) int64 { return min(allocated(fi), fi.Size()) }

// allocated is what the file system has given to a file or folder.
func allocated(fi fs.FileInfo) int64 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512 // stat(2): in units of 512 bytes, whatever the file system's blocks are
	}
	return fi.Size()
}

// footprint is what a blob takes on disk: its bytes, its sidecars and its folder.
func (s *Store) footprint(d digest.Digest) (n int64, err error) {
	f, err := s.root.Open(blobDir(d))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	n = allocated(fi)
	es, err := f.ReadDir(-1)
	if err != nil {
		return 0, err
	}
	for _, e := range es {
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, err
		}
		n += allocated(fi)
	}
	return n, nil
}

// admit makes an entry of a blob whose size bytes have been reserved, and accounts for the disk bytes that it takes; -1 when they are not
// known. The store's lock is held.
func (s *Store) admit(d digest.Digest, size, disk int64, marked bool) {
	e := &entry{size: size, disk: size, access: time.Now(), marked: marked} // size is what was reserved
	s.entries[d] = e
	if disk < 0 {
		s.resettle(d)
		return
	}
	s.used, e.disk = s.used+disk-size, disk
}

// settle corrects what is accounted for a blob after its sidecars have changed.
func (s *Store) settle(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.resettle(d)
}

// resettle is settle with the store's lock held.
func (s *Store) resettle(d digest.Digest) {
	e := s.entries[d]
	if e == nil {
		return
	}
	disk, err := s.footprint(d)
	if err != nil {
		s.log.Warn("what a blob takes on disk is not known", "digest", d, "error", err)
		return
	}
	s.used += disk - e.disk
	e.disk = disk
}

// supersede takes an idle partial blob off the account, whose file is about to be replaced. The store's lock is held.
func (s *Store) supersede(d digest.Digest) {
	if !s.has(d, filePieces) {
		return
	}
	if fi, err := s.root.Stat(blobFile(d, fileData)); err == nil {
		s.used -= occupied(fi)
	}
}

// statfs is what others than root may still write to the store's file system.
func (s *Store) statfs() (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Fstatfs(int(s.lock.Fd()), &st); err != nil {
		return 0, fmt.Errorf("free space of %s: %w", s.cfg.Dir, err)
	}
	return int64(min(st.Bavail, math.MaxInt64/uint64(st.Bsize))) * st.Bsize, nil
}

// fileSystem is the size of the store's file system in bytes.
func (s *Store) fileSystem() (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Fstatfs(int(s.lock.Fd()), &st); err != nil {
		return 0, fmt.Errorf("size of the file system of %s: %w", s.cfg.Dir, err)
	}
	return int64(min(st.Blocks, math.MaxInt64/uint64(st.Bsize))) * st.Bsize, nil
}

// excess says how many bytes should be evicted so that n more can be written, and how many must be.
func (s *Store) excess(n int64) (should, must int64) {
	if c := s.cfg.Capacity; c > 0 {
		if after := s.used + n; after > int64(float64(c)*s.cfg.HighWater) {
			should, must = after-int64(float64(c)*s.cfg.LowWater), after-c
		}
	}
	avail, err := s.avail()
	if err != nil {
		s.log.Warn("free space is not known", "error", err)
		return should, max(must, 0)
	}
	if short := n + int64(s.cfg.MinFree) - avail; short > 0 {
		// A sixteenth more, so that the next few writes find room.
		should, must = max(should, short+int64(s.cfg.MinFree)/16), max(must, short)
	}
	return should, max(must, 0)
}

// reserve accounts for n more bytes and evicts what is least recently used to make room. The caller must not hold the lock.
func (s *Store) reserve(n int64) error {
	s.mu.Lock()
	should, must := s.excess(n)
	if should <= 0 || must == 0 && s.used+n <= s.retryAt {
		s.used += n
		s.mu.Unlock()
		return nil
	}
	freed, gone, err := s.evict(should)
	s.retryAt = 0
	if freed < should {
		// What is left is in use. Looking through it again for each chunk would be slow.
		s.retryAt = s.used + n + s.cfg.Capacity/128
	}
	if err == nil && freed < must {
		err = fmt.Errorf("%w: %d bytes more are needed, %d are taken by what is open, pinned, partial or not written back (capacity %d, min_free %d)",
			ErrFull, n, s.used, s.cfg.Capacity, s.cfg.MinFree)
	}
	if err == nil {
		s.used += n
	}
	s.mu.Unlock()
	s.evicted(gone)
	return err
}

func (s *Store) unreserve(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used -= n
}

// evict drops least recently used blobs that take n bytes in all, or as many as there are. The store's lock is held.
func (s *Store) evict(n int64) (freed int64, gone []digest.Digest, err error) {
	type candidate struct {
		d digest.Digest
		e *entry
	}
	var cs []candidate
	for d, e := range s.entries {
		if _, pinned := s.pins[d]; e.open == 0 && !e.marked && !pinned {
			cs = append(cs, candidate{d, e})
		}
	}
	slices.SortFunc(cs, func(a, b candidate) int { return a.e.access.Compare(b.e.access) })
	for _, c := range cs {
		if freed >= n {
			break
		}
		if err := s.drop(c.d, c.e); err != nil {
			return freed, gone, err
		}
		freed += c.e.disk
		gone = append(gone, c.d)
	}
	return freed, gone, nil
}

func (s *Store) evicted(gone []digest.Digest) {
	if s.cfg.OnEvict == nil {
		return
	}
	for _, d := range gone {
		s.cfg.OnEvict(d)
	}
}

// Usage is the bytes in use and the capacity (0: unbounded).
func (s *Store) Usage() (used, capacity int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used, s.cfg.Capacity
}

// Recent lists the whole blobs that were used since a time and that keep wants, the latest first, at most n.
func (s *Store) Recent(since time.Time, n int, keep func(Info) bool) []Info {
	type used struct {
		Info
		at time.Time
	}
	var all []used
	s.mu.Lock()
	for d, e := range s.entries {
		if !e.access.Before(since) {
			all = append(all, used{Info{d, e.size}, e.access})
		}
	}
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b used) int { return cmp.Or(b.at.Compare(a.at), cmp.Compare(a.Digest, b.Digest)) })
	out := make([]Info, 0, min(n, len(all)))
	for _, u := range all {
		if len(out) == n {
			break
		}
		if keep(u.Info) {
			out = append(out, u.Info)
		}
	}
	return out
}

// Touch counts as an access of those of ds that are there, like Open.
func (s *Store) Touch(ds ...digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	for _, d := range ds {
		if e := s.entries[d]; e != nil {
			e.access = now
		}
	}
}

func pinFile(d digest.Digest) string {
	return path.Join("pins", d.Algorithm().String()+"-"+d.Encoded())
}

// scanPins finds what was pinned.
func (s *Store) scanPins() error {
	s.pins = map[digest.Digest]bool{}
	es, err := fs.ReadDir(s.root.FS(), "pins")
	if err != nil {
		return err
	}
	for _, e := range es {
		if d, err := blob.ParseDigest(strings.Replace(e.Name(), "-", ":", 1)); err == nil {
			s.pins[d] = false
		}
	}
	for _, d := range s.cfg.Pinned {
		s.pins[d] = true
	}
	return nil
}

// Pin keeps a blob from being evicted until Unpin, across restarts. It need not be there yet.
func (s *Store) Pin(d digest.Digest) error {
	if _, err := blob.ParseDigest(d.String()); err != nil {
		return fmt.Errorf("pin: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, there := s.pins[d]; there {
		return nil
	}
	if err := s.writeFile(pinFile(d), nil); err != nil {
		return fmt.Errorf("pin %s: %w", d, err)
	}
	s.pins[d] = false
	return nil
}

// Unpin ends Pin. A blob that was not pinned is fine; ErrConfigured when the configuration pins it.
func (s *Store) Unpin(d digest.Digest) error {
	if _, err := blob.ParseDigest(d.String()); err != nil {
		return fmt.Errorf("unpin: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pins[d] {
		return fmt.Errorf("unpin %s: %w", d, ErrConfigured)
	}
	delete(s.pins, d)
	s.retryAt = 0
	if err := s.remove(pinFile(d)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("unpin %s: %w", d, err)
	}
	return nil
}

// Pins lists what is pinned.
func (s *Store) Pins() []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]digest.Digest, 0, len(s.pins))
	for d := range s.pins {
		out = append(out, d)
	}
	slices.Sort(out)
	return out
}
