package sql

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
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

func update(t *testing.T, s *Store, f func(*Tx) error) {
	t.Helper()
	if err := s.Update(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

func manifest(repo, text string, gen int64) Manifest {
	return Manifest{Repository: repo, Digest: digest.FromString(text), MediaType: "x/y", Generation: gen, Bytes: []byte(text)}
}

func TestTagsFollowGenerations(t *testing.T) {
	s, _ := open(t)
	a, b := manifest("r", "a", 1), manifest("r", "b", 2)
	update(t, s, func(tx *Tx) error {
		return errors.Join(tx.PutManifest(a), tx.PutManifest(b), tx.PutTag("r", "v", b.Digest, 20))
	})
	if err := s.Update(t.Context(), func(tx *Tx) error { return tx.PutTag("r", "v", a.Digest, 10) }); !errors.Is(err, ErrNewerTag) {
		t.Errorf("an older generation: %v, want ErrNewerTag", err)
	}
	if d, gen, err := s.Tag(t.Context(), "r", "v"); err != nil || d != b.Digest || gen != 20 {
		t.Errorf("tag %s at %d, %v: an older generation won", d, gen, err)
	}
	if m, err := s.ManifestByTag(t.Context(), "r", "v"); err != nil || string(m.Bytes) != "b" {
		t.Errorf("manifest %+v, %v", m, err)
	}
	if err := s.Update(t.Context(), func(tx *Tx) error { return tx.DeleteTag("r", "v", 15) }); !errors.Is(err, ErrNotFound) {
		t.Errorf("an older deletion: %v, want ErrNotFound", err)
	}
	update(t, s, func(tx *Tx) error { return tx.DeleteTag("r", "v", 30) })
	if _, _, err := s.Tag(t.Context(), "r", "v"); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted tag: %v", err)
	}
}

func TestEmptiedRepositoryEnds(t *testing.T) {
	s, _ := open(t)
	m, layer := manifest("r", "a", 1), digest.FromString("layer")
	update(t, s, func(tx *Tx) error { return errors.Join(tx.PutManifest(m), tx.PutLayer("r", layer, 5)) })
	for _, step := range []struct {
		delete func(*Tx) error
		want   bool
	}{
		{func(tx *Tx) error { _, err := tx.DeleteManifest("r", m.Digest, 9); return err }, true},
		{func(tx *Tx) error { return tx.DeleteLayer("r", layer) }, false},
	} {
		update(t, s, step.delete)
		if ok, err := s.HasRepository(t.Context(), "r"); err != nil || ok != step.want {
			t.Errorf("the repository exists: %v, %v; want %v", ok, err, step.want)
		}
	}
}

func TestDeletedManifestTakesItsTags(t *testing.T) {
	s, _ := open(t)
	m := manifest("r", "a", 1)
	update(t, s, func(tx *Tx) error {
		return errors.Join(tx.PutManifest(m), tx.PutTag("r", "v1", m.Digest, 1), tx.PutTag("r", "v2", m.Digest, 1))
	})
	var tags []string
	update(t, s, func(tx *Tx) (err error) {
		tags, err = tx.DeleteManifest("r", m.Digest, 9)
		return err
	})
	slices.Sort(tags)
	if !slices.Equal(tags, []string{"v1", "v2"}) {
		t.Errorf("tags that went: %v", tags)
	}
	var n int
	if err := s.r.QueryRow(`SELECT count(*) FROM contents`).Scan(&n); err != nil || n != 0 {
		t.Errorf("%d contents stay, %v", n, err)
	}
}

func TestFailedTransactionChangesNothing(t *testing.T) {
	s, _ := open(t)
	no := errors.New("no")
	err := s.Update(t.Context(), func(tx *Tx) error {
		return errors.Join(tx.PutLayer("r", digest.FromString("x"), 1), tx.Enqueue(registry.NameRecord{}), no)
	})
	if !errors.Is(err, no) {
		t.Errorf("update: %v", err)
	}
	if n, err := s.OutboxLen(t.Context()); err != nil || n != 0 {
		t.Errorf("outbox has %d rows, %v", n, err)
	}
	if ok, err := s.HasRepository(t.Context(), "r"); err != nil || ok {
		t.Errorf("repository: %v, %v", ok, err)
	}
}

// Writers that come together share a transaction: one that fails takes nothing of the others with it, and its own writes are undone.
func TestWritersTogether(t *testing.T) {
	s, _ := open(t)
	no := errors.New("no")
	const n = 40
	began, goOn := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	first := make(chan error, 1)
	go func() {
		first <- s.Update(t.Context(), func(tx *Tx) error {
			close(began)
			<-goOn
			return tx.PutLayer("first", digest.FromString("x"), 1)
		})
	}()
	<-began
	errs := make([]error, n)
	for i := range errs {
		wg.Go(func() {
			errs[i] = s.Update(t.Context(), func(tx *Tx) error {
				err := tx.PutLayer(fmt.Sprintf("r%d", i), digest.FromString("x"), 1)
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
		if ok, err := s.HasRepository(t.Context(), fmt.Sprintf("r%d", i)); err != nil || ok != (i%2 == 0) {
			t.Errorf("repository of writer %d: %v, %v", i, ok, err)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Update(ended, func(*Tx) error { t.Error("ran"); return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that is over: %v", err)
	}
}

func TestOutboxSurvives(t *testing.T) {
	s, path := open(t)
	update(t, s, func(tx *Tx) error { return tx.Enqueue(registry.NameRecord{Repository: "r", Tag: "v", Generation: 7}) })
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	rows, err := s.Outbox(t.Context(), 0, 10)
	if err != nil || len(rows) != 1 || rows[0].Record.Generation != 7 {
		t.Fatalf("rows %+v, %v", rows, err)
	}
	if err := s.Done(t.Context(), rows[0].ID); err != nil {
		t.Fatal(err)
	}
	if n, err := s.OutboxLen(t.Context()); err != nil || n != 0 {
		t.Errorf("%d rows are left, %v", n, err)
	}
}

// A row that can't be read is returned with its reason, and the rows after it are.
func TestOutboxRowThatCannotBeRead(t *testing.T) {
	s, _ := open(t)
	if _, err := s.w.Exec(`INSERT INTO outbox (record, generation) VALUES ('{', 1)`); err != nil {
		t.Fatal(err)
	}
	update(t, s, func(tx *Tx) error {
		return tx.Enqueue(registry.NameRecord{Repository: "r", Bytes: []byte("x"), Generation: 7})
	})
	rows, err := s.Outbox(t.Context(), 0, 10)
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
	if _, err := Open(context.Background(), path); !errors.Is(err, ErrNewerSchema) || !strings.Contains(err.Error(), "999") {
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
		"tags":         {queryTags, []any{"r", "", 100}},
		"repositories": {queryRepositories, []any{"", 100}},
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

func TestPages(t *testing.T) {
	s, _ := open(t)
	m := manifest("r", "a", 1)
	update(t, s, func(tx *Tx) error {
		err := tx.PutManifest(m)
		for i := range 25 {
			err = errors.Join(err, tx.PutTag("r", fmt.Sprintf("v%02d", i), m.Digest, 1))
		}
		return err
	})
	var all []string
	for last := ""; ; {
		page, err := s.Tags(t.Context(), "r", last, 10)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			break
		}
		all, last = append(all, page...), page[len(page)-1]
	}
	if len(all) != 25 || !slices.IsSorted(all) {
		t.Errorf("pages add up to %v", all)
	}
}

// A page costs the same in a repository of 100,000 tags, first or last, as in one of 100.
func TestPagesOfManyTags(t *testing.T) {
	s, _ := open(t)
	const n, page = 100_000, 100
	for repo, tags := range map[string]int{"many": n, "few": page} {
		_, err := s.w.Exec(`WITH RECURSIVE c (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM c WHERE i + 1 < ?)
			INSERT INTO tags (repository, tag, digest, generation) SELECT ?, printf('v%06d', i), ?, 1 FROM c`, tags, repo, digest.FromString("a"))
		if err != nil {
			t.Fatal(err)
		}
	}
	pages := map[string][2]string{"of few": {"few", ""}, "first": {"many", ""}, "last": {"many", fmt.Sprintf("v%06d", n-page-1)}}
	took := map[string][]time.Duration{}
	for range 100 {
		for name, p := range pages {
			began := time.Now()
			tags, err := s.Tags(t.Context(), p[0], p[1], page)
			if err != nil || len(tags) != page {
				t.Fatalf("%s: %d tags, %v", name, len(tags), err)
			}
			took[name] = append(took[name], time.Since(began))
		}
	}
	median := func(name string) time.Duration {
		slices.Sort(took[name])
		return took[name][len(took[name])/2]
	}
	for _, name := range []string{"first", "last"} {
		t.Logf("%s page of %d tags: %v, page of %d: %v", name, n, median(name), page, median("of few"))
		if median(name) > median("of few")*3/2 {
			t.Errorf("%s page of %d tags took %v, a page of %d %v", name, n, median(name), page, median("of few"))
		}
	}
}

// TestDatabaseIsTheOwnersAlone: so are the files that SQLite keeps beside it.
func TestDatabaseIsTheOwnersAlone(t *testing.T) {
	s, path := open(t)
	update(t, s, func(*Tx) error { return nil })
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
