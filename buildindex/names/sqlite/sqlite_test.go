package sqlite

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/buildindex/names/namestest"
	"kraken/proto/cluster"
)

func open(t *testing.T) (*Store, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "names.db")
	s, err := Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, path
}

func TestNames(t *testing.T) {
	namestest.Run(t, func(t *testing.T) func() names.Store {
		path := filepath.Join(t.TempDir(), "names.db")
		return func() names.Store {
			s, err := Open(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
			return s
		}
	})
}

// Bytes of manifests go with the last repository that has them, and tombstones with what is put again.
func TestNothingIsLeft(t *testing.T) {
	s, _ := open(t)
	m := names.Manifest{Repository: "r", Digest: digest.FromString("a"), Bytes: []byte("a"), Generation: 1}
	update(t, s, func(tx names.Tx) error {
		return errors.Join(tx.PutManifest(m), tx.PutTag("r", "v", names.Version{Digest: m.Digest, Generation: 1}), tx.PutLayer("r", m.Digest, 1, 50))
	})
	update(t, s, func(tx names.Tx) error { _, err := tx.DeleteManifest("r", m.Digest, 2); return err })
	update(t, s, func(tx names.Tx) error { return tx.DeleteLayer("r", m.Digest, 60) })
	update(t, s, func(tx names.Tx) error { return tx.PutLayer("r", m.Digest, 1, 61) })
	var contents, tombstones int
	if err := s.r.QueryRow(`SELECT (SELECT count(*) FROM contents), (SELECT count(*) FROM tombstones)`).Scan(&contents, &tombstones); err != nil || contents != 0 || tombstones != 2 {
		t.Errorf("%d contents and %d tombstones stay, %v; want those of the manifest and of its tag", contents, tombstones, err)
	}
}

func update(t *testing.T, s *Store, f func(names.Tx) error) {
	t.Helper()
	if err := s.Update(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

// Writers that come together share a transaction: one that fails takes nothing of the others with it, and its own
// writes are undone.
func TestWritersTogether(t *testing.T) {
	s, _ := open(t)
	no := errors.New("no")
	const n = 40
	began, goOn := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	first := make(chan error, 1)
	go func() {
		first <- s.Update(t.Context(), func(tx names.Tx) error {
			close(began)
			<-goOn
			return tx.PutLayer("first", digest.FromString("x"), 1, names.NoGeneration)
		})
	}()
	<-began
	errs := make([]error, n)
	for i := range errs {
		wg.Go(func() {
			errs[i] = s.Update(t.Context(), func(tx names.Tx) error {
				err := tx.PutLayer(fmt.Sprintf("r%d", i), digest.FromString("x"), 1, names.NoGeneration)
				if i%2 == 1 {
					err = errors.Join(err, no)
				}
				return err
			})
		})
	}
	for queued := 0; queued < n; runtime.Gosched() {
		s.mu.Lock()
		queued = len(s.queue)
		s.mu.Unlock()
	}
	close(goOn)
	wg.Wait()
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	for i, err := range errs {
		if (i%2 == 1) != errors.Is(err, no) {
			t.Errorf("writer %d: %v", i, err)
		}
		if _, err := s.Layer(t.Context(), fmt.Sprintf("r%d", i), digest.FromString("x")); (i%2 == 1) != errors.Is(err, names.ErrNotFound) {
			t.Errorf("the blob of writer %d: %v", i, err)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Update(ended, func(names.Tx) error { t.Error("ran"); return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that is over: %v", err)
	}
}

// A row that can't be read is returned with its reason, and the rows after it are.
func TestOutboxRowThatCannotBeRead(t *testing.T) {
	s, _ := open(t)
	if _, err := s.w.Exec(`INSERT INTO outbox (bucket, record, generation) VALUES ('x', '{', 1)`); err != nil {
		t.Fatal(err)
	}
	update(t, s, func(tx names.Tx) error {
		return tx.Enqueue("x", cluster.NameRecord{Repository: "r", Bytes: []byte("x"), Generation: 7})
	})
	rows, err := s.Outbox(t.Context(), "x", 0, 10)
	if err != nil || len(rows) != 2 || rows[0].Err == nil || rows[1].Err != nil || rows[1].Record.Bytes != nil {
		t.Errorf("rows %+v, %v; want an error, then one without bytes", rows, err)
	}
}

func TestNewerSchemaIsRefused(t *testing.T) {
	s, path := open(t)
	if _, err := s.w.Exec(`INSERT INTO goose_db_version (version_id, is_applied) VALUES (999, 1)`); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := Open(context.Background(), path); !errors.Is(err, names.ErrNewerSchema) || !strings.Contains(err.Error(), "999") {
		t.Errorf("open: %v, want ErrNewerSchema with the version", err)
	}
}

// TestPagingReadsAnIndex: neither scan nor sort, whatever the number of tags.
func TestPagingReadsAnIndex(t *testing.T) {
	s, _ := open(t)
	for name, q := range map[string]struct {
		text string
		args []any
	}{
		"queued":       {queryQueuedBefore, []any{"key", 7}},
		"outbox":       {queryOutbox, []any{"x", 0, 100}},
		"tags":         {queryTags, []any{"r", "", 100}},
		"layers":       {queryLayers, []any{"r", "", 100}},
		"repositories": {queryRepositories, []any{"", 100}},
		"mirrored":     {queryMirroredTags, []any{"r", "", 100}},
		"holders":      {queryBlobHolders, []any{"d", "", 100}},
		"referrers":    {queryReferrers, []any{"r", "d", "", 100}},
	} {
		rows, err := s.r.Query(`EXPLAIN QUERY PLAN `+q.text, q.args...)
		if err != nil {
			t.Fatal(err)
		}
		var plan []string
		for rows.Next() {
			var id, parent, unused int
			var detail string
			if err := rows.Scan(&id, &parent, &unused, &detail); err != nil {
				t.Fatal(err)
			}
			plan = append(plan, detail)
		}
		if err := errors.Join(rows.Err(), rows.Close()); err != nil {
			t.Fatal(err)
		}
		for _, step := range plan {
			if strings.HasPrefix(step, "SCAN") || strings.Contains(step, "TEMP B-TREE") {
				t.Errorf("%s: %s", name, step)
			}
		}
		if len(plan) == 0 {
			t.Errorf("%s: no plan", name)
		}
	}
}

// A page costs about the same in a repository of 100,000 tags, first or last, as in one of 100.
func TestPagesOfManyTags(t *testing.T) {
	s, _ := open(t)
	const n, page = 100_000, 100
	for repo, tags := range map[string]int{"many": n, "few": page} {
		if _, err := s.w.Exec(`INSERT INTO repositories (name) VALUES (?)`, repo); err != nil {
			t.Fatal(err)
		}
		_, err := s.w.Exec(`WITH RECURSIVE c (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM c WHERE i + 1 < ?)
			INSERT INTO tags (repository, tag, digest, generation) SELECT ?, printf('v%06d', i), ?, 1 FROM c`, tags, repo, digest.FromString("a"))
		if err != nil {
			t.Fatal(err)
		}
	}
	pages := map[string][2]string{"of few": {"few", ""}, "first": {"many", ""}, "last": {"many", fmt.Sprintf("v%06d", n-page-1)}}
	best := map[string]time.Duration{} // others use the machine, too
	for range 100 {
		for name, p := range pages {
			began := time.Now()
			tags, err := s.Tags(t.Context(), p[0], p[1], page)
			took := time.Since(began)
			if err != nil || len(tags) != page {
				t.Fatalf("%s: %d tags, %v", name, len(tags), err)
			}
			if best[name] == 0 || took < best[name] {
				best[name] = took
			}
		}
	}
	for _, name := range []string{"first", "last"} {
		t.Logf("%s page of %d tags: %v, page of %d: %v", name, n, best[name], page, best["of few"])
		if best[name] > 5*best["of few"] { // and a scan takes hundreds of times
			t.Errorf("%s page of %d tags took %v, a page of %d %v", name, n, best[name], page, best["of few"])
		}
	}
}

// TestDatabaseIsTheOwnersAlone: so are the files that SQLite keeps beside it.
func TestDatabaseIsTheOwnersAlone(t *testing.T) {
	s, path := open(t)
	update(t, s, func(names.Tx) error { return nil })
	all, err := filepath.Glob(path + "*")
	if err != nil || len(all) < 2 {
		t.Fatalf("%v, %v: want the database and its log", all, err)
	}
	for _, f := range all {
		if fi, err := os.Stat(f); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, fi.Mode(), err)
		}
	}
}
