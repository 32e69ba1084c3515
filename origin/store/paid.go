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

// A marker is the second place of a membership: it says to which repositories a blob was pushed. When it is paid it is
// kept for a while in the folder paid, so that a database that is brought back from an older copy meanwhile still
// learns of the membership.

// maxPaid bounds the payments that are remembered; the oldest go first, a hundredth of them at a time.
const maxPaid = 100_000

// Paid is a marker that was paid.
type Paid struct {
	Size         int64     `json:"size"` // of the blob in bytes
	Repositories []string  `json:"repositories"`
	At           time.Time `json:"at"`
}

func paidFile(d digest.Digest) string { return fileOf("paid", d) }

// scanPaid finds what was paid before this start. What can't be read counts for nothing.
func (s *Store) scanPaid() error {
	return s.eachOf("paid", func(d digest.Digest) {
		var p Paid
		if b, err := s.root.ReadFile(paidFile(d)); err == nil && json.Unmarshal(b, &p) == nil {
			s.paid[d] = p
		}
	})
}

// keepPaid remembers, durably, that the marker m was paid. The blob's folder is claimed.
func (s *Store) keepPaid(d digest.Digest, m Marker, size int64) error {
	if size == SizeUnknown || len(m.Repositories) == 0 {
		return nil // a membership has a size
	}
	s.mu.Lock()
	before, again := s.paid[d]
	p := Paid{Size: size, Repositories: union(before.Repositories, m.Repositories), At: time.Now().UTC()}
	s.mu.Unlock()
	b, err := json.Marshal(p)
	if err == nil {
		err = s.writeFile(paidFile(d), b)
	}
	if err != nil {
		return fmt.Errorf("remember the payment of %s: %w", d, err)
	}
	s.mu.Lock()
	s.paid[d] = p
	s.mu.Unlock()
	if again {
		return nil
	}
	return s.boundPaid(maxPaid)
}

// boundPaid forgets the oldest payments where there are more than most. One whose blob is claimed is being paid again,
// and stays.
func (s *Store) boundPaid(most int) error {
	type payment struct {
		d  digest.Digest
		at time.Time
	}
	var all []payment
	s.mu.Lock()
	if len(s.paid) > most {
		for d, p := range s.paid {
			all = append(all, payment{d, p.At})
		}
	}
	s.mu.Unlock()
	if len(all) == 0 {
		return nil
	}
	slices.SortFunc(all, func(a, b payment) int { return a.at.Compare(b.at) })
	for _, old := range all[:len(all)-most+most/100] {
		release, ok := s.tryClaim(blobDir(old.d))
		if !ok {
			continue
		}
		err := s.forgetPaid(old.d)
		release()
		if err != nil {
			return err
		}
	}
	return nil
}

// Paid returns what was paid and not forgotten yet, by digest.
func (s *Store) Paid() map[digest.Digest]Paid {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[digest.Digest]Paid, len(s.paid))
	for d, p := range s.paid {
		out[d] = p
	}
	return out
}

// ForgetPaid forgets what was paid before a time. What is forgotten may be remembered again after a crash.
func (s *Store) ForgetPaid(before time.Time) error {
	s.mu.Lock()
	var old []digest.Digest
	for d, p := range s.paid {
		if p.At.Before(before) {
			old = append(old, d)
		}
	}
	s.mu.Unlock()
	slices.Sort(old)
	for _, d := range old {
		if err := s.forgetPaidBefore(d, before); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) forgetPaidBefore(d digest.Digest, before time.Time) error {
	defer s.claim(blobDir(d))()
	s.mu.Lock()
	p, ok := s.paid[d]
	s.mu.Unlock()
	if !ok || !p.At.Before(before) { // paid once more meanwhile
		return nil
	}
	return s.forgetPaid(d)
}

func (s *Store) forgetPaid(d digest.Digest) error {
	if err := s.root.Remove(paidFile(d)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget the payment of %s: %w", d, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.paid, d)
	return nil
}
