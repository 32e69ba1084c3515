package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// Marker says that a blob is not yet in the buckets that it lists. The markers are the queue of write-back: they are
// found again at the next start, and a marked blob is never evicted.
type Marker struct {
	Targets      []string  `json:"targets"`      // names of buckets that still lack the blob
	Repositories []string  `json:"repositories"` // that it was pushed to
	Created      time.Time `json:"created"`
}

// Mark adds m to what is known of a blob's write-back, durably.
func (s *Store) Mark(d digest.Digest, m Marker) error {
	if err := s.find(d); err != nil {
		return fmt.Errorf("mark: %w", err)
	}
	defer s.claim(blobDir(d))()
	s.mu.Lock()
	there := s.entries[d] != nil
	s.mu.Unlock()
	if !there {
		return fmt.Errorf("mark: %w: %s", ErrNotFound, d)
	}
	if _, err := s.mark(d, m); err != nil {
		return fmt.Errorf("mark %s: %w", d, err)
	}
	s.recount(d)
	return nil
}

// mark merges m into what is on the disk, and into the blob's entry if it has one. The blob's folder is claimed, so
// nobody evicts it meanwhile.
func (s *Store) mark(d digest.Digest, m Marker) (Marker, error) {
	old, err := s.heldMarker(d)
	if err == nil {
		m.Created = old.Created
		m.Targets = union(old.Targets, m.Targets)
		m.Repositories = union(old.Repositories, m.Repositories)
		if slices.Equal(m.Targets, old.Targets) && slices.Equal(m.Repositories, old.Repositories) {
			return old, nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	if err := s.writeMarker(d, m); err != nil {
		return m, err
	}
	return m, nil
}

// writeMarker makes m the marker of a blob, on the disk and then in memory. The blob's folder is claimed.
func (s *Store) writeMarker(d digest.Digest, m Marker) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := s.writeFile(blobFile(d, fileMarker), b); err != nil {
		return err
	}
	s.know(d, m)
	return nil
}

// know takes a marker that is durable for what a blob owes, if it has an entry.
func (s *Store) know(d digest.Digest, m Marker) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.entries[d]; e != nil {
		e.marked, e.marker = true, &m
	}
}

// heldMarker is readMarker of a marker that is durable, and known: a change before this one may have failed after it
// could be seen. The blob's folder is claimed.
func (s *Store) heldMarker(d digest.Digest) (Marker, error) {
	m, err := s.readMarker(d)
	if err == nil {
		err = s.settle()
	}
	if err == nil {
		s.know(d, m)
	}
	return m, err
}

func union(a, b []string) []string {
	out := append(slices.Clone(a), b...)
	slices.Sort(out)
	return slices.Compact(out)
}

func (s *Store) readMarker(d digest.Digest) (Marker, error) {
	var m Marker
	b, err := s.root.ReadFile(blobFile(d, fileMarker))
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return m, fmt.Errorf("marker of %s: %w", d, err)
	}
	return m, nil
}

// Marker returns a blob's marker, ErrNotFound when it has none. The caller does not change it.
func (s *Store) Marker(d digest.Digest) (Marker, error) {
	if err := s.find(d); err != nil {
		return Marker{}, fmt.Errorf("marker: %w", err)
	}
	s.mu.Lock()
	e := s.entries[d]
	var m *Marker
	marked := false
	if e != nil {
		m, marked = e.marker, e.marked
	}
	x, owed := s.debts[d]
	s.mu.Unlock()
	switch {
	case m != nil:
		return *m, nil
	case marked: // it could not be read at the start
		return s.readMarker(d)
	case owed && len(x.Targets) > 0:
		return x.Marker, nil
	case owed:
		return Marker{}, fmt.Errorf("debt of %s: it could not be read", d)
	}
	return Marker{}, fmt.Errorf("marker: %w: %s", ErrNotFound, d)
}

// Marked lists the blobs that are known to wait for write-back, also those whose bytes were lost; while the store is
// scanned there may be more.
func (s *Store) Marked() []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []digest.Digest
	for d, e := range s.entries {
		if e.marked {
			out = append(out, d)
		}
	}
	for d := range s.debts {
		if e := s.entries[d]; e == nil || !e.marked {
			out = append(out, d)
		}
	}
	slices.Sort(out)
	return out
}

// Debts is the number of blobs that are known to wait for write-back, and since when the oldest does.
func (s *Store) Debts() (n int, oldest time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	count := func(m *Marker) {
		n++
		if m != nil && !m.Created.IsZero() && (oldest.IsZero() || m.Created.Before(oldest)) {
			oldest = m.Created
		}
	}
	for _, e := range s.entries {
		if e.marked {
			count(e.marker)
		}
	}
	for d, x := range s.debts {
		if e := s.entries[d]; e == nil || !e.marked {
			count(&x.Marker)
		}
	}
	return n, oldest
}

// Unmark says that target has the blob, for the repositories that m listed. It removes the marker when no target is
// left and nothing was added to it meanwhile.
func (s *Store) Unmark(d digest.Digest, m Marker, target string) error {
	if err := s.find(d); err != nil {
		return fmt.Errorf("unmark: %w", err)
	}
	defer s.claim(blobDir(d))()
	now, err := s.heldMarker(d)
	if errors.Is(err, fs.ErrNotExist) {
		return s.payWithoutBytes(d, m, target)
	}
	if err != nil {
		return err
	}
	if !slices.Equal(now.Repositories, m.Repositories) {
		// Pushed to another repository while it was written back: once more, for its link.
		return nil
	}
	now.Targets = slices.DeleteFunc(now.Targets, func(t string) bool { return t == target })
	if len(now.Targets) > 0 {
		return s.writeMarker(d, now)
	}
	size := int64(SizeUnknown)
	s.mu.Lock()
	if e := s.entries[d]; e != nil {
		size = e.size
	}
	s.mu.Unlock()
	if err := s.keepPaid(d, m, size); err != nil {
		return fmt.Errorf("unmark %s: %w", d, err)
	}
	if err := s.remove(blobFile(d, fileMarker)); err != nil {
		return fmt.Errorf("unmark %s: %w", d, err)
	}
	s.mu.Lock()
	if e := s.entries[d]; e != nil {
		e.marked, e.marker = false, nil
	}
	s.mu.Unlock()
	s.recount(d)
	return nil
}
