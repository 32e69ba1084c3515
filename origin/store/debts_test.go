package store

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// lostDebt is a store with one debt whose bytes are gone.
func lostDebt(t *testing.T, m Marker) (*Store, digest.Digest, []byte) {
	t.Helper()
	s, b := open(t, Config{}), noise(3000, 1)
	d := ingest(t, s, b, &m)
	if err := os.RemoveAll(filepath.Join(s.cfg.Dir, blobDir(d))); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(d); err == nil {
		t.Fatal("opened without its file")
	}
	if size, lost := s.Lost(d); !lost || size != 3000 {
		t.Fatalf("%d bytes, lost: %v", size, lost)
	}
	return s, d, b
}

// A debt without bytes is settled target by target, as others are, and not by who knows only a part of it.
func TestDebtWithoutBytesIsSettled(t *testing.T) {
	m := Marker{Targets: []string{"a", "b"}, Repositories: []string{"r"}, Created: time.Unix(1000, 0)}
	s, d, _ := lostDebt(t, m)
	if err := s.Unmark(d, Marker{Repositories: []string{"other"}}, "a"); err != nil {
		t.Error(err)
	}
	if now, err := s.Marker(d); err != nil || len(now.Targets) != 2 {
		t.Errorf("settled for another repository: %+v, %v", now, err)
	}
	for i, target := range []string{"a", "b"} {
		if err := s.Unmark(d, m, target); err != nil {
			t.Error(err)
		}
		s = reopen(t, s)
		if n, _ := s.Debts(); n != 1-i {
			t.Errorf("%d debts after %s", n, target)
		}
	}
}

// A push of the blob takes the debt over: one marker with what both say.
func TestPushTakesADebtOver(t *testing.T) {
	s, d, b := lostDebt(t, Marker{Targets: []string{"a"}, Repositories: []string{"r"}, Created: time.Unix(1000, 0)})
	ingest(t, s, b, &Marker{Targets: []string{"b"}, Repositories: []string{"q"}, Created: time.Unix(2000, 0)})
	m, err := s.Marker(d)
	if err != nil || !slices.Equal(m.Targets, []string{"a", "b"}) || !slices.Equal(m.Repositories, []string{"q", "r"}) || m.Created.Unix() != 1000 {
		t.Errorf("%+v, %v", m, err)
	}
	if es, err := os.ReadDir(filepath.Join(s.cfg.Dir, "debts")); err != nil || len(es) != 0 {
		t.Errorf("left in debts: %v, %v", es, err)
	}
}

// What can't be read any more stays counted until the blob is pushed again.
func TestUnreadableDebtStays(t *testing.T) {
	s, d, b := lostDebt(t, Marker{Targets: []string{"a"}, Repositories: []string{"r"}})
	if err := os.WriteFile(filepath.Join(s.cfg.Dir, debtFile(d)), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	if m, err := s.Marker(d); err == nil {
		t.Errorf("read as %+v", m)
	}
	ingest(t, s, b, nil)
	if n, _ := s.Debts(); n != 1 {
		t.Errorf("%d debts after the bytes came without a marker", n)
	}
	if s.evictableNow(d) {
		t.Error("what is owed would be evicted")
	}
	if err := s.Mark(d, Marker{Targets: []string{"a"}, Repositories: []string{"r"}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Unmark(d, Marker{Repositories: []string{"r"}}, "a"); err != nil {
		t.Fatal(err)
	}
}

func (s *Store) evictableNow(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.evictable(d, s.entries[d])
}

// A store is closed though a removal hangs, and does not begin those that are left.
func TestCloseLeavesVictims(t *testing.T) {
	s := open(t, Config{Capacity: 4 << 20, Keep: Keep{HighWater: 0.5, LowWater: 0.2}})
	for i := range byte(40) {
		upload(t, s, UploadOptions{Transient: true, NoMetainfo: true}, noise(40_000, i))
	}
	w := slowDisk(s)
	s.fsync = s.root.Sync
	upload(t, s, UploadOptions{Transient: true, NoMetainfo: true}, noise(500_000, 100))
	<-w.waiting
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	<-s.ctx.Done()
	close(w.on)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if n := len(w.waiting); n > 0 {
		t.Errorf("%d more removals after Close had begun", n)
	}
}
