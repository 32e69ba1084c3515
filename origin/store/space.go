package store

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/config"
)

// Keep is what an operator says about keeping blobs; origins and agents have the same keys.
type Keep struct {
	// HighWater is the fraction of the capacity above which blobs are evicted, LowWater the one down to which. Defaults
	// 0.95 and 0.85.
	HighWater float64 `yaml:"high_water"`
	LowWater  float64 `yaml:"low_water"`
	// MinFree is what is to stay free on the file system: blobs are evicted for it, too, and nothing is taken without
	// it.
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
	folder, files, err := readFolder(s.root, blobDir(d))
	if err != nil {
		return 0, err
	}
	n = allocated(folder)
	for _, fi := range files {
		n += allocated(fi)
	}
	return n, nil
}

// admit makes an entry of a blob whose size bytes have been reserved, and accounts for the disk bytes that it takes.
// The store's lock is held, and the blob's folder claimed.
func (s *Store) admit(d digest.Digest, size, disk int64, m *Marker) {
	s.entries[d] = &entry{size: size, disk: disk, access: time.Now(), marked: m != nil, marker: m}
	s.used += disk - size
}

// recount corrects what is accounted for a blob after its sidecars have changed. The blob's folder is claimed.
func (s *Store) recount(d digest.Digest) {
	disk, err := s.footprint(d)
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[d]
	switch {
	case e == nil:
	case err != nil:
		s.log.Warn("what a blob takes on disk is not known", "digest", d, "error", err)
	default:
		s.used += disk - e.disk
		e.disk = disk
	}
}

// supersede takes an idle partial blob off the account, whose file is about to be replaced. The blob's folder is
// claimed.
func (s *Store) supersede(d digest.Digest) {
	if !s.has(d, filePieces) {
		return
	}
	if fi, err := s.root.Stat(blobFile(d, fileData)); err == nil {
		s.unreserve(occupied(fi))
	}
}

// excess says how many bytes should be chosen to be removed so that n more can be written while avail are free, and how
// many must be gone before that. The store's lock is held.
func (s *Store) excess(n, avail int64) (should, must int64) {
	if c := s.cfg.Capacity; c > 0 {
		if after := s.used + n; after > int64(float64(c)*s.cfg.HighWater) {
			should = after - int64(float64(c)*s.cfg.LowWater)
		}
		must = s.used + s.leaving + n - c
	}
	if short := n + int64(s.cfg.MinFree) - avail; short > 0 {
		// A sixteenth more, so that the next few writes find room.
		should, must = max(should, short+int64(s.cfg.MinFree)/16-s.leaving), max(must, short)
	}
	return should, max(must, 0)
}

func (s *Store) unreserve(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used -= n
}

// Usage is the bytes in use, without those that are being removed, and the capacity (0: unbounded).
func (s *Store) Usage() (used, capacity int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used, s.cfg.Capacity
}
