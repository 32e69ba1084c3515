package store

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// Victims are chosen with the store's lock and removed without it, by one goroutine. From the choice on they are not
// found, and their folders are claimed: who takes such a blob in again waits until its old folder is gone.

var errClosed = errors.New("store is closed")

// victim is a blob that was chosen and whose folder, which is claimed, has to go.
type victim struct {
	d    digest.Digest
	disk int64
}

// reserve accounts for n more bytes. Above the high water mark it chooses what is least recently used to be removed; it
// waits for that only if the bytes would not fit otherwise. The caller holds neither lock nor claim.
func (s *Store) reserve(n int64) error {
	for {
		avail := s.available()
		s.mu.Lock()
		should, must := s.excess(n, avail)
		scanning := s.scan.running.Load()
		if must <= 0 && (should <= 0 || scanning || s.evicting || s.used+n <= s.retryAt) {
			s.used += n
			s.mu.Unlock()
			return nil
		}
		freed := s.freed.C()
		wait := must > 0 && (s.evicting || should <= 0 && s.leaving > 0)
		if scanning || wait {
			s.mu.Unlock()
			if err := s.await(scanning, freed); err != nil {
				return err
			}
			continue
		}
		s.evicting = true
		s.mu.Unlock()
		room, gone := s.evict(n, should)
		s.evicted(gone)
		if must > 0 && room < must {
			return s.fullFor(n)
		}
	}
}

// await waits for the scan's end, else until something has changed since freed was read.
func (s *Store) await(scanning bool, freed <-chan struct{}) error {
	if scanning {
		freed = s.scan.done
	}
	select {
	case <-freed:
		return nil
	case <-s.ctx.Done():
		return errClosed
	}
}

// candidate is a blob that nobody needs to have, as it was when it was looked at.
type candidate struct {
	d      digest.Digest
	e      *entry
	held   bool // somebody has it open who lets go of it when it is evicted
	access time.Time
}

// evict chooses least recently used blobs that take want bytes in all, or as many as there are, for n bytes that are to
// come. Those that somebody has open and would let go of come last. It returns the bytes that will be free when all
// that was chosen, also before, is removed. s.evicting is set, and not any more afterwards.
func (s *Store) evict(n, want int64) (room int64, gone []digest.Digest) {
	s.mu.Lock()
	cs := make([]candidate, 0, len(s.entries))
	for d, e := range s.entries {
		if s.evictable(d, e) {
			cs = append(cs, candidate{d, e, e.yielding > 0, e.access})
		}
	}
	s.mu.Unlock()
	slices.SortFunc(cs, func(a, b candidate) int {
		if a.held != b.held {
			if a.held {
				return 1
			}
			return -1
		}
		return cmp.Or(a.access.Compare(b.access), cmp.Compare(a.d, b.d))
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	var chosen int64
	for _, c := range cs {
		if chosen >= want {
			break
		}
		_, claimed := s.claims[blobDir(c.d)]
		if claimed || s.entries[c.d] != c.e || c.e.access != c.access || !s.evictable(c.d, c.e) {
			continue // used, marked or removed since
		}
		s.takeOut(c.d, c.e)
		s.claims[blobDir(c.d)] = make(chan struct{})
		s.victims = append(s.victims, victim{c.d, c.e.disk})
		chosen += c.e.disk
		gone = append(gone, c.d)
	}
	s.retryAt = 0
	if chosen < want {
		// What is left is in use. Looking through it again for each chunk would be slow.
		s.retryAt = s.used + n + s.cfg.Capacity/128
	}
	if len(s.victims) > 0 && !s.removing && !s.closed {
		s.removing = true
		s.work.Go(s.removeVictims)
	}
	s.evicting = false
	s.freed.Wake()
	return s.leaving, gone
}

// evictable says that a blob may be removed to make room. The store's lock is held.
func (s *Store) evictable(d digest.Digest, e *entry) bool {
	_, pinned := s.pins[d]
	return e.open == 0 && !pinned && !s.owes(d)
}

// takeOut makes a blob unknown whose folder is going to be removed by who has it claimed. The store's lock is held.
func (s *Store) takeOut(d digest.Digest, e *entry) {
	delete(s.entries, d)
	s.used -= e.disk
	s.leaving += e.disk
}

// removeVictims removes what was chosen, until nothing is left.
func (s *Store) removeVictims() {
	for {
		s.mu.Lock()
		if len(s.victims) == 0 {
			s.removing = false
			s.victims = nil
			s.freed.Wake()
			s.mu.Unlock()
			return
		}
		v := s.victims[0]
		s.victims = s.victims[1:]
		err := s.ctx.Err() // Close does not wait for what is left
		s.mu.Unlock()
		if err == nil {
			err = s.removeAll(blobDir(v.d))
		}
		if err != nil && s.ctx.Err() == nil {
			s.log.Warn("an evicted blob was not removed from the disk: the next start finds it again", "digest", v.d, "error", err)
		}
		s.left(v.disk, err)
		s.release(blobDir(v.d))
	}
}

// left accounts for what takeOut took out, once it was removed or, with err, was not.
func (s *Store) left(disk int64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leaving -= disk
	if err != nil {
		s.used += disk
	}
	s.freed.Wake()
}

// removeWhole removes a whole blob unless may refuses it, which is called with the store's lock. What the blob owes to
// the bucket is kept as a debt without bytes. ErrNotFound when it is not there.
func (s *Store) removeWhole(d digest.Digest, may func(*entry) error) error {
	if err := s.find(d); err != nil {
		return err
	}
	s.mu.Lock()
	there := s.entries[d] != nil
	s.mu.Unlock()
	if !there {
		return fmt.Errorf("%w: %s", ErrNotFound, d)
	}
	defer s.claim(blobDir(d))()
	s.mu.Lock()
	e := s.entries[d]
	var err error
	if e == nil {
		err = fmt.Errorf("%w: %s", ErrNotFound, d)
	} else {
		err = may(e)
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if e.marked { // it can't change: the folder is claimed
		if err := s.keepDebt(d, e.debt()); err != nil {
			return errors.Join(errKept, err)
		}
	}
	s.mu.Lock()
	s.takeOut(d, e)
	s.mu.Unlock()
	err = s.removeAll(blobDir(d))
	s.left(e.disk, err)
	if err != nil {
		return fmt.Errorf("remove blob %s: %w", d, err)
	}
	return nil
}

// lose forgets a blob whose file is not what was committed: somebody else has removed or changed it. It is fetched
// again by whoever needs it. What it owes to the bucket stays owed. It returns whether OnEvict is to be told.
func (s *Store) lose(d digest.Digest, e *entry, why error) bool {
	err := s.removeWhole(d, func(now *entry) error {
		if now != e {
			return ErrNotFound
		}
		return nil
	})
	if errors.Is(err, ErrNotFound) {
		return false
	}
	if errors.Is(err, errKept) { // the next who opens it tries again
		s.log.Error("a blob whose file somebody else has removed or changed is not forgotten yet", "digest", d, "why", why, "error", err)
		return false
	}
	s.lost.Add(1)
	s.log.Error("a blob is forgotten, whose file somebody else has removed or changed", "digest", d, "why", why, "error", err)
	return true
}

// background runs f, which Close waits for; not any more once Close has begun.
func (s *Store) background(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.work.Go(f)
	}
}

func (s *Store) evicted(gone []digest.Digest) {
	if s.cfg.OnEvict == nil {
		return
	}
	for _, d := range gone {
		s.cfg.OnEvict(d)
	}
}
