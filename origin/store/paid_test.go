package store

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// The oldest payments go where there are too many, but none of a blob that is being paid again: its new payment may be
// on the disk already.
func TestBoundPaid(t *testing.T) {
	s := open(t, Config{Dir: t.TempDir()})
	var ds []digest.Digest
	for i := range 300 {
		d := digest.FromString(fmt.Sprint(i))
		if err := s.keepPaid(d, Marker{Repositories: []string{"r"}}, 1); err != nil {
			t.Fatal(err)
		}
		s.mu.Lock()
		p := s.paid[d]
		p.At = time.Unix(int64(i), 0)
		s.paid[d] = p
		s.mu.Unlock()
		ds = append(ds, d)
	}
	release := s.claim(blobDir(ds[1]))
	if err := s.boundPaid(200); err != nil {
		t.Fatal(err)
	}
	release()
	var left []int
	for d := range s.Paid() {
		left = append(left, slices.Index(ds, d))
	}
	slices.Sort(left)
	if len(left) != 199 || left[0] != 1 || left[1] != 102 {
		t.Errorf("%d are left, first %v; want 199: the second, which was claimed, and from the 103rd on", len(left), left[:2])
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n := len(open(t, Config{Dir: s.cfg.Dir}).Paid()); n != len(left) {
		t.Errorf("another start finds %d payments, want %d", n, len(left))
	}
}
