package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/opencontainers/go-digest"
)

// A debt to the bucket outlives the bytes. When the file of a marked blob is found to be unusable, the marker moves to
// the folder debts before the blob's folder goes: a debt without bytes. The next commit of the same blob takes it over;
// Unmark settles it where it is.

// debt is a marker without bytes, and the size that they had, which may be SizeUnknown.
type debt struct {
	Marker
	Size int64 `json:"size"`
}

func debtFile(d digest.Digest) string { return fileOf("debts", d) }

// scanDebts finds the debts without bytes of the last run.
func (s *Store) scanDebts() error {
	return s.eachOf("debts", func(d digest.Digest) {
		x := debt{Size: SizeUnknown}
		b, err := s.root.ReadFile(debtFile(d))
		if err == nil {
			err = json.Unmarshal(b, &x)
		}
		if err != nil {
			s.log.Error("what is owed to the bucket can't be read; pushing the blob again settles it", "digest", d, "error", err)
			x = debt{Size: SizeUnknown}
		}
		s.debts[d] = x
	})
}

// keepDebt makes x a debt without bytes, durably. The blob's folder is claimed.
func (s *Store) keepDebt(d digest.Digest, x debt) error {
	b, err := json.Marshal(x)
	if err != nil {
		return err
	}
	if err := s.writeFile(debtFile(d), b); err != nil {
		return fmt.Errorf("keep the debt of %s: %w", d, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.debts[d] = x
	return nil
}

// dropDebt removes a debt without bytes. The blob's folder is claimed.
func (s *Store) dropDebt(d digest.Digest) error {
	if err := s.remove(debtFile(d)); err != nil {
		return fmt.Errorf("drop the debt of %s: %w", d, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.debts, d)
	return nil
}

// takeOver adds the debt without bytes of a blob, if there is one, to the marker m that it is committed with. complete
// says that m has all of it, so that it can be dropped once m is durable. The blob's folder is claimed.
func (s *Store) takeOver(d digest.Digest, m *Marker) (_ *Marker, complete bool) {
	s.mu.Lock()
	x, owed := s.debts[d]
	s.mu.Unlock()
	switch {
	case !owed:
		return m, false
	case len(x.Targets) == 0: // it could not be read
		return m, m != nil
	case m == nil:
		return &x.Marker, true
	}
	return &Marker{Targets: union(x.Targets, m.Targets), Repositories: union(x.Repositories, m.Repositories), Created: x.Created}, true
}

// owes says that a blob is owed to the bucket, whether its bytes are here or not. The store's lock is held.
func (s *Store) owes(d digest.Digest) bool {
	if e := s.entries[d]; e != nil && e.marked {
		return true
	}
	_, owed := s.debts[d]
	return owed
}

// NumLost is the number of debts whose bytes this store has lost. Debts counts them, too.
func (s *Store) NumLost() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for d := range s.debts {
		if s.entries[d] == nil {
			n++
		}
	}
	return n
}

// Lost returns the size of a blob that is owed and whose bytes this store has lost, which may be SizeUnknown. ok is
// false for all others.
func (s *Store) Lost(d digest.Digest) (size int64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x, owed := s.debts[d]
	return x.Size, owed && s.entries[d] == nil
}

// payWithoutBytes is Unmark for a debt without bytes. The blob's folder is claimed.
func (s *Store) payWithoutBytes(d digest.Digest, m Marker, target string) error {
	s.mu.Lock()
	x, owed := s.debts[d]
	s.mu.Unlock()
	if !owed || !slices.Equal(x.Repositories, m.Repositories) {
		return nil
	}
	x.Targets = slices.DeleteFunc(slices.Clone(x.Targets), func(t string) bool { return t == target })
	if len(x.Targets) > 0 {
		return s.keepDebt(d, x)
	}
	if err := s.keepPaid(d, m, x.Size); err != nil {
		return err
	}
	return s.dropDebt(d)
}

// loseFolder removes the folder of a blob whose data is not what was committed, at the scan. What it owes is kept as a
// debt.
func (s *Store) loseFolder(d digest.Digest, size int64, files map[string]fs.FileInfo) error {
	if files[fileMarker] != nil {
		m, err := s.readMarker(d)
		if err != nil {
			s.log.Error("what a lost blob owes to the bucket can't be read; pushing it again settles it", "digest", d, "error", err)
		}
		if err := s.keepDebt(d, debt{m, size}); err != nil {
			return err
		}
	}
	return s.removeAll(blobDir(d))
}

// errKept says that a blob that can't be used was not removed, because what it owes could not be kept without it.
var errKept = errors.New("what it owes can't be kept elsewhere")
