package store

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"slices"
)

// Name records are opaque here: small files under keys, which an origin keeps for build-index until the bucket has what
// they say. Their keys are known in memory.

var nameKey = regexp.MustCompile(`^[a-z0-9-]{1,128}$`)

func nameFile(key string) (string, error) {
	if !nameKey.MatchString(key) {
		return "", fmt.Errorf("name record: key %.80q: want %s", key, nameKey)
	}
	return path.Join("names", key), nil
}

// PutName stores a record under key, durably when it returns, whatever is held.
func (s *Store) PutName(key string, b []byte) error {
	return s.ChangeName(key, func([]byte, error) (NameChange, []byte) { return ReplaceName, b })
}

// DeleteName removes a record, whatever it is; one that is not there is fine.
func (s *Store) DeleteName(key string) error {
	return s.ChangeName(key, func([]byte, error) (NameChange, []byte) { return RemoveName, nil })
}

// NameChange is what becomes of a record.
type NameChange int

const (
	LeaveName NameChange = iota
	ReplaceName
	RemoveName
)

// ChangeName does with a record what decide says of the one that is held, with no other change of it between. decide is
// called once, with what Name returns, which is durable then; ReplaceName comes with the new record. What it says is
// durable when ChangeName returns.
func (s *Store) ChangeName(key string, decide func(held []byte, err error) (NameChange, []byte)) error {
	f, err := nameFile(key)
	if err != nil {
		return err
	}
	defer s.claim(f)()
	switch what, b := decide(s.heldName(key)); what {
	case ReplaceName:
		return s.putName(f, key, b)
	case RemoveName:
		return s.deleteName(f, key)
	}
	return nil
}

// heldName is Name of a record that is durable, and listed: a change before this one may have failed after the record
// could be seen. The caller has claimed its file.
func (s *Store) heldName(key string) ([]byte, error) {
	b, err := s.Name(key)
	if err == nil {
		err = s.settle()
	}
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names[key] = struct{}{}
	return b, nil
}

// putName writes a record. The caller has claimed the file f.
func (s *Store) putName(f, key string, b []byte) error {
	if err := s.writeFile(f, b); err != nil {
		return fmt.Errorf("put name record %s: %w", key, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names[key] = struct{}{}
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

// deleteName removes a record. The caller has claimed the file f.
func (s *Store) deleteName(f, key string) error {
	if err := s.remove(f); err != nil {
		return fmt.Errorf("delete name record %s: %w", key, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.names, key)
	return nil
}

// Names lists the keys of all records, sorted.
func (s *Store) Names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.names))
}

// NumNames is the number of records.
func (s *Store) NumNames() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.names)
}

// scanNames finds the records of the last run.
func (s *Store) scanNames() error {
	es, err := fs.ReadDir(s.root.FS(), "names")
	if err != nil {
		return fmt.Errorf("list name records: %w", err)
	}
	for _, e := range es {
		if nameKey.MatchString(e.Name()) {
			s.names[e.Name()] = struct{}{}
		}
	}
	return nil
}
