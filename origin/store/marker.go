package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// Marker says that a blob is not yet in the buckets that it lists. The markers are the queue of write-back: they are found again
// at the next start, and a marked blob is never evicted.
type Marker struct {
	Targets      []string  `json:"targets"`      // names of buckets that still lack the blob
	Repositories []string  `json:"repositories"` // that it was pushed to
	Created      time.Time `json:"created"`
}

// Mark adds m to what is known of a blob's write-back, durably.
func (s *Store) Mark(d digest.Digest, m Marker) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.entries[d] == nil {
		return fmt.Errorf("mark: %w: %s", ErrNotFound, d)
	}
	if err := s.mark(d, m); err != nil {
		return fmt.Errorf("mark %s: %w", d, err)
	}
	s.resettle(d)
	return nil
}

// mark merges; the store's lock is held.
func (s *Store) mark(d digest.Digest, m Marker) error {
	old, err := s.readMarker(d)
	if err == nil {
		m.Created = old.Created
		m.Targets = union(old.Targets, m.Targets)
		m.Repositories = union(old.Repositories, m.Repositories)
		if slices.Equal(m.Targets, old.Targets) && slices.Equal(m.Repositories, old.Repositories) {
			return nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := s.writeFile(blobFile(d, fileMarker), b); err != nil {
		return err
	}
	if e := s.entries[d]; e != nil {
		e.marked = true
	}
	return nil
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

// Marker returns a blob's marker, ErrNotFound when it has none.
func (s *Store) Marker(d digest.Digest) (Marker, error) {
	m, err := s.readMarker(d)
	if errors.Is(err, fs.ErrNotExist) {
		return m, fmt.Errorf("marker: %w: %s", ErrNotFound, d)
	}
	return m, err
}

// Marked lists the blobs that wait for write-back.
func (s *Store) Marked() []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []digest.Digest
	for d, e := range s.entries {
		if e.marked {
			out = append(out, d)
		}
	}
	slices.Sort(out)
	return out
}

// Unmark says that target has the blob, for the repositories that m listed. It removes the marker when no target is left and nothing
// was added to it meanwhile.
func (s *Store) Unmark(d digest.Digest, m Marker, target string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, err := s.readMarker(d)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
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
		b, err := json.Marshal(now)
		if err != nil {
			return err
		}
		return s.writeFile(blobFile(d, fileMarker), b)
	}
	if err := s.remove(blobFile(d, fileMarker)); err != nil {
		return fmt.Errorf("unmark %s: %w", d, err)
	}
	if e := s.entries[d]; e != nil {
		e.marked = false
	}
	s.resettle(d)
	return nil
}

var nameKey = regexp.MustCompile(`^[a-z0-9-]{1,128}$`)

func nameFile(key string) (string, error) {
	if !nameKey.MatchString(key) {
		return "", fmt.Errorf("name record: key %.80q: want %s", key, nameKey)
	}
	return path.Join("names", key), nil
}

// PutName stores a record under key, durably when it returns.
func (s *Store) PutName(key string, b []byte) error {
	f, err := nameFile(key)
	if err != nil {
		return err
	}
	defer s.claim(f)()
	if err := s.writeFile(f, b); err != nil {
		return fmt.Errorf("put name record %s: %w", key, err)
	}
	return nil
}

// Name returns a record, ErrNotFound when there is none.
func (s *Store) Name(key string) ([]byte, error) {
	f, err := nameFile(key)
	if err != nil {
		return nil, err
	}
	b, err := s.root.ReadFile(f)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("name record: %w: %s", ErrNotFound, key)
	}
	return b, err
}

// DeleteName removes a record; one that is not there is fine.
func (s *Store) DeleteName(key string) error {
	f, err := nameFile(key)
	if err != nil {
		return err
	}
	defer s.claim(f)()
	return s.remove(f)
}

// Names lists the keys of all records.
func (s *Store) Names() ([]string, error) {
	es, err := fs.ReadDir(s.root.FS(), "names")
	if err != nil {
		return nil, fmt.Errorf("list name records: %w", err)
	}
	var out []string
	for _, e := range es {
		if nameKey.MatchString(e.Name()) {
			out = append(out, e.Name())
		}
	}
	return out, nil
}
