package store

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
)

// counted is an FS that counts what is synced.
type counted struct {
	calls
	syncs, all *atomic.Int64
}

func (c counted) Sync(f *os.File) error {
	c.syncs.Add(1)
	return c.calls.Sync(f)
}

func (c counted) SyncAll() error {
	c.all.Add(1)
	return c.calls.SyncAll()
}

func (c counted) Sub(name string) (FS, error) {
	sub, err := c.calls.Sub(name)
	return counted{sub, c.syncs, c.all}, err
}

// What the process before has left is synced at a start by one call, however many blobs it owes. Only who looks one up
// before that is over syncs that blob's folders.
func TestStartSyncsOnce(t *testing.T) {
	const n = 300
	dir := t.TempDir()
	var syncs, all atomic.Int64
	open := func(beforeScan func()) *Store {
		s, err := Open(Config{Dir: dir, beforeScan: beforeScan, OpenFS: func(dir string) (FS, error) {
			fsys, err := openFolder(dir)
			return counted{fsys, &syncs, &all}, err
		}})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open(nil)
	var ds []digest.Digest
	for i := range n {
		b := fmt.Sprint("blob ", i)
		ds = append(ds, digest.FromString(b))
		m := &Marker{Targets: []string{"b"}, Repositories: []string{"r"}}
		if _, err := s.Ingest(t.Context(), ds[i], int64(len(b)), strings.NewReader(b), m); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	syncs.Store(0)
	all.Store(0)
	hold := make(chan struct{})
	s = open(func() { <-hold })
	defer s.Close()
	before := syncs.Load()
	if _, err := s.Stat(ds[0]); err != nil {
		t.Fatal(err)
	}
	if got := syncs.Load() - before; got > 2 {
		t.Errorf("a lookup before the scan has synced %d folders", got)
	}
	if all.Load() != 0 {
		t.Error("a lookup before the scan has synced all")
	}
	close(hold)
	<-s.Scanned()
	if len(s.Marked()) != n || syncs.Load() > 10 || all.Load() != 1 {
		t.Errorf("a start with %d of %d owed blobs has synced %d folders, and all %d times", len(s.Marked()), n, syncs.Load(), all.Load())
	}
}
