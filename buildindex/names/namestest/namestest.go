// Package namestest is the suite of names.Store, which every driver passes.
package namestest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// Run tests a driver. fresh makes an empty database and returns what opens it: each call of that is a further Store of
// the same database, as of another process, which the driver's test closes.
func Run(t *testing.T, fresh func(t *testing.T) (open func() names.Store)) {
	for name, test := range map[string]func(*suite){
		"condition":              (*suite).condition,
		"generations":            (*suite).generations,
		"tombstones":             (*suite).tombstones,
		"layers":                 (*suite).layers,
		"any order":              (*suite).anyOrder,
		"compare and swap":       (*suite).compareAndSwap,
		"if none match":          (*suite).ifNoneMatch,
		"immutable":              (*suite).immutable,
		"delete beside put":      (*suite).deleteBesidePut,
		"deleted manifest":       (*suite).deletedManifest,
		"emptied repository":     (*suite).emptied,
		"failed update":          (*suite).failed,
		"canceled":               (*suite).canceled,
		"manifest":               (*suite).manifest,
		"pages":                  (*suite).pages,
		"referrers":              (*suite).referrers,
		"outbox":                 (*suite).outbox,
		"meta":                   (*suite).meta,
		"access":                 (*suite).access,
		"refused":                (*suite).refused,
		"repositories of a blob": (*suite).layerRepositories,
		"another store sees all": (*suite).shared,
		"mirror":                 (*suite).mirror,
		"pruned mirror":          (*suite).prunedMirror,
	} {
		t.Run(name, func(t *testing.T) {
			open := fresh(t)
			test(&suite{T: t, open: open, s: open()})
		})
	}
}

// suite is one test on a database of its own.
type suite struct {
	*testing.T
	open func() names.Store
	s    names.Store
}

const repo = "some/repository"

var (
	a, b = digest.FromString("a"), digest.FromString("b")
	v    = registry.Reference{Tag: "v"}
)

func (t *suite) must(err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (t *suite) update(f func(tx names.Tx) error) {
	t.Helper()
	t.must(t.s.Update(t.Context(), f))
}

// push is a put of a manifest by tag.
func push(tx names.Tx, d digest.Digest, generation int64) error {
	err := tx.PutManifest(names.Manifest{Repository: repo, Digest: d, MediaType: "x/y", Generation: generation, Bytes: []byte(d)})
	if err != nil {
		return err
	}
	return tx.PutTag(repo, v.Tag, names.Version{Digest: d, Generation: generation})
}

func (t *suite) push(d digest.Digest, generation int64) {
	t.Helper()
	t.update(func(tx names.Tx) error { return push(tx, d, generation) })
}

// wantTag wants the tag to name d, or not to be there when d is empty.
func (t *suite) wantTag(d digest.Digest) {
	t.Helper()
	got, err := t.s.Tag(t.Context(), repo, v.Tag)
	if d == "" && errors.Is(err, names.ErrNotFound) {
		return
	}
	if err != nil || got.Digest != d {
		t.Errorf("the tag is %v, %v; want %q", got, err, d)
	}
}

// wantConflict wants an error of Update to be a conflict of this kind that tells what is there.
func (t *suite) wantConflict(err, kind error, now names.Version) {
	t.Helper()
	var c *names.Conflict
	if !errors.As(err, &c) || !errors.Is(err, kind) || c.Repository != repo || c.Now != now {
		t.Errorf("got %v; want a conflict of kind %q with %v", err, kind, now)
	}
}

func (t *suite) condition() {
	for name, c := range map[string]struct {
		is          names.Condition
		onA, onNone bool
	}{
		"none":         {names.Condition{}, true, true},
		"exists":       {names.Condition{Exists: true}, true, false},
		"absent":       {names.Condition{Absent: true}, false, true},
		"this one":     {names.Condition{OneOf: []digest.Digest{b, a}}, true, false},
		"another":      {names.Condition{OneOf: []digest.Digest{b}}, false, false},
		"one of none":  {names.Condition{OneOf: []digest.Digest{}}, false, false},
		"not this":     {names.Condition{NoneOf: []digest.Digest{a}}, false, true},
		"not another":  {names.Condition{NoneOf: []digest.Digest{b}}, true, true},
		"fixed":        {names.Condition{Fixed: a}, true, true},
		"fixed before": {names.Condition{Fixed: b}, false, true},
	} {
		t.update(func(tx names.Tx) error {
			for _, ref := range []registry.Reference{{Tag: "none"}, {Digest: b}} {
				if err := tx.Require(repo, ref, c.is); (err == nil) != c.onNone {
					t.Errorf("%s of what is not there: %v", name, err)
				}
			}
			if err := push(tx, a, 5); err != nil {
				return err
			}
			for _, ref := range []registry.Reference{v, {Digest: a}} {
				err := tx.Require(repo, ref, c.is)
				if c.onA {
					t.must(err)
					continue
				}
				t.wantConflict(err, names.ErrCondition, names.Version{Digest: a, Generation: 5})
			}
			return nil
		})
	}
}

func (t *suite) generations() {
	t.push(a, 1)
	t.push(b, 20)
	now := names.Version{Digest: b, Generation: 20}
	t.wantConflict(t.s.Update(t.Context(), func(tx names.Tx) error { return push(tx, a, 10) }), names.ErrNewer, now)
	t.wantConflict(t.s.Update(t.Context(), func(tx names.Tx) error { return push(tx, a, 20) }), names.ErrNewer, now)
	t.push(b, 20) // the same change again
	t.wantConflict(t.s.Update(t.Context(), func(tx names.Tx) error { return tx.DeleteTag(repo, v.Tag, 15) }), names.ErrNewer, now)
	t.wantConflict(t.s.Update(t.Context(), func(tx names.Tx) error { _, err := tx.DeleteManifest(repo, b, 15); return err }), names.ErrNewer, now)
	t.wantTag(b)
	t.update(func(tx names.Tx) error { return tx.DeleteTag(repo, v.Tag, 30) })
	t.wantTag("")
	// Of names without a generation the last one wins.
	t.update(func(tx names.Tx) error {
		return errors.Join(tx.PutTag(repo, "w", names.Version{Digest: a}), tx.PutTag(repo, "w", names.Version{Digest: b}))
	})
	if got, err := t.s.Tag(t.Context(), repo, "w"); err != nil || got.Digest != b {
		t.Errorf("a tag without a generation: %v, %v", got, err)
	}
}

func (t *suite) tombstones() {
	t.push(a, 10)
	t.update(func(tx names.Tx) error { return tx.DeleteTag(repo, v.Tag, 30) })
	dead := names.Version{Generation: 30}
	t.wantConflict(t.s.Update(t.Context(), func(tx names.Tx) error { return push(tx, a, 20) }), names.ErrNewer, dead)
	t.wantConflict(t.s.Update(t.Context(), func(tx names.Tx) error { return push(tx, a, 30) }), names.ErrNewer, dead)
	for n, want := range map[cluster.Name]int64{cluster.TagName(repo, v.Tag): 30, cluster.ManifestName(repo, a): 0, cluster.MembershipName(repo, a): 0} {
		if got, err := t.s.Deleted(t.Context(), n); err != nil || got != want {
			t.Errorf("%s was deleted at %d, %v; want %d", n, got, err, want)
		}
	}
	t.push(a, 31)
	if got, err := t.s.Deleted(t.Context(), cluster.TagName(repo, v.Tag)); err != nil || got != 0 {
		t.Errorf("what was put again was deleted at %d, %v", got, err)
	}
	t.update(func(tx names.Tx) error { _, err := tx.DeleteManifest(repo, a, 50); return err })
	dead.Generation = 50
	t.wantConflict(t.s.Update(t.Context(), func(tx names.Tx) error { return push(tx, a, 40) }), names.ErrNewer, dead)
	t.push(b, 51)
	// A deletion of what is not there counts, when its Update goes on.
	t.update(func(tx names.Tx) error {
		if err := tx.DeleteTag(repo, "w", 70); !errors.Is(err, names.ErrNotFound) {
			t.Errorf("deletion of what is not there: %v", err)
		}
		return nil
	})
	err := t.s.Update(t.Context(), func(tx names.Tx) error { return tx.PutTag(repo, "w", names.Version{Digest: b, Generation: 60}) })
	t.wantConflict(err, names.ErrNewer, names.Version{Generation: 70})
	t.wantTag(b)
}

func (t *suite) layers() {
	put := func(generation int64) error {
		return t.s.Update(t.Context(), func(tx names.Tx) error { return tx.PutLayer(repo, a, 7, generation) })
	}
	remove := func(generation int64) error {
		return t.s.Update(t.Context(), func(tx names.Tx) error { return tx.DeleteLayer(repo, a, generation) })
	}
	t.must(put(20))
	t.wantConflict(remove(10), names.ErrNewer, names.Version{Digest: a, Generation: 20})
	for _, r := range []string{repo, ""} {
		if l, err := t.s.Layer(t.Context(), r, a); err != nil || l != (names.Layer{Size: 7, Generation: 20}) {
			t.Errorf("layer of %q: %+v, %v", r, l, err)
		}
	}
	for last, want := range map[digest.Digest][]names.Member{"": {{Digest: a, Size: 7}}, a: nil} {
		if l, err := t.s.Layers(t.Context(), repo, last, 10); err != nil || !slices.Equal(l, want) {
			t.Errorf("members after %q: %v, %v, want %v", last, l, err, want)
		}
	}
	t.must(remove(30))
	t.wantConflict(put(25), names.ErrNewer, names.Version{Generation: 30})
	for _, r := range []string{repo, ""} {
		if _, err := t.s.Layer(t.Context(), r, a); !errors.Is(err, names.ErrNotFound) {
			t.Errorf("deleted layer of %q: %v", r, err)
		}
	}
	if err := remove(40); !errors.Is(err, names.ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
	t.wantConflict(put(names.NoGeneration), names.ErrNewer, names.Version{Generation: 30})
	t.must(put(41))
	t.must(remove(42))
}

// Changes of one name end in the same state in whatever order they come.
func (t *suite) anyOrder() {
	const orders = 120
	name := func(i int) string { return fmt.Sprintf("order%d", i) }
	t.update(func(tx names.Tx) error {
		for i := range orders {
			r := name(i)
			put := func(d digest.Digest, generation int64) error {
				m := names.Manifest{Repository: r, Digest: d, MediaType: "x/y", Generation: generation, Bytes: []byte(d)}
				if err := tx.PutManifest(m); err != nil {
					return err
				}
				return tx.PutTag(r, v.Tag, names.Version{Digest: d, Generation: generation})
			}
			changes := []func() error{
				func() error { return put(a, 1) },
				func() error { return put(b, 2) },
				func() error { return tx.DeleteTag(r, v.Tag, 3) },
				func() error { return put(a, 4) },
				func() error { _, err := tx.DeleteManifest(r, b, 5); return err },
			}
			for n := i; len(changes) > 0; {
				k := n % len(changes)
				n /= len(changes)
				if err := changes[k](); err != nil && !errors.Is(err, names.ErrNotFound) && !errors.Is(err, names.ErrNewer) {
					return err
				}
				changes = slices.Delete(changes, k, k+1)
			}
		}
		return nil
	})
	for i := range orders {
		if got, err := t.s.Tag(t.Context(), name(i), v.Tag); err != nil || got != (names.Version{Digest: a, Generation: 4}) {
			t.Errorf("order %d: the tag is %v, %v", i, got, err)
		}
		if _, err := t.s.StatManifest(t.Context(), name(i), b); !errors.Is(err, names.ErrNotFound) {
			t.Errorf("order %d: the deleted manifest: %v", i, err)
		}
	}
}

// race runs f in n writers at once, by turns through two stores of one database, and returns how many had no error. The
// others must have a conflict of this kind.
func (t *suite) race(n int, kind error, f func(i int, tx names.Tx) error) int {
	t.Helper()
	stores := []names.Store{t.s, t.open()}
	var won atomic.Int64
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			err := stores[i%2].Update(t.Context(), func(tx names.Tx) error { return f(i, tx) })
			var c *names.Conflict
			switch {
			case err == nil:
				won.Add(1)
			case !errors.As(err, &c) || !errors.Is(err, kind):
				t.Errorf("writer %d: %v", i, err)
			}
		})
	}
	close(start)
	wg.Wait()
	return int(won.Load())
}

const writers = 16

func one(i int) digest.Digest { return digest.FromString(fmt.Sprint("writer ", i)) }

// Of writers that all replace the same version one wins.
func (t *suite) compareAndSwap() {
	t.push(a, 1)
	now := a
	for round := range 5 {
		var winner atomic.Int64
		n := t.race(writers, names.ErrCondition, func(i int, tx names.Tx) error {
			if err := tx.Require(repo, v, names.Condition{OneOf: []digest.Digest{now}}); err != nil {
				return err
			}
			winner.Store(int64(i))
			return push(tx, one(round*writers+i), int64(1_000*(round+1)+i))
		})
		if n != 1 {
			t.Fatalf("%d writers have replaced the same version", n)
		}
		now = one(round*writers + int(winner.Load()))
		t.wantTag(now)
	}
}

// Of writers that all want a tag not to exist one wins.
func (t *suite) ifNoneMatch() {
	n := t.race(writers, names.ErrCondition, func(i int, tx names.Tx) error {
		if err := tx.Require(repo, v, names.Condition{Absent: true}); err != nil {
			return err
		}
		return push(tx, one(i), int64(100+i))
	})
	if n != 1 {
		t.Errorf("%d writers have made the same tag", n)
	}
}

// An immutable tag is what the first writer made it; those that want the same are no conflict.
func (t *suite) immutable() {
	n := t.race(writers, names.ErrCondition, func(i int, tx names.Tx) error {
		d := one(i / 4)
		if err := tx.Require(repo, v, names.Condition{Fixed: d}); err != nil {
			return err
		}
		err := push(tx, d, int64(100+i))
		if errors.Is(err, names.ErrNewer) { // the same digest, by a later generation
			err = nil
		}
		return err
	})
	if n != 4 {
		t.Errorf("%d of %d writers have had their way, of each digest there are 4", n, writers)
	}
}

// Puts and deletions at once, whatever their order: the highest generation that was done wins.
func (t *suite) deleteBesidePut() {
	for round := range 5 {
		base := int64(1_000 * (round + 1))
		t.push(a, base)
		var top atomic.Int64
		t.race(writers, names.ErrNewer, func(i int, tx names.Tx) error {
			generation := base + int64(1+(i*7)%writers)
			var err error
			if i%2 == 0 {
				err = push(tx, one(i), generation)
			} else if err = tx.DeleteTag(repo, v.Tag, generation); errors.Is(err, names.ErrNotFound) {
				err = nil
			}
			for err == nil {
				if was := top.Load(); was >= generation || top.CompareAndSwap(was, generation) {
					break
				}
			}
			return err
		})
		if want := base + writers; top.Load() != want {
			t.Fatalf("generation %d was the last that was done, want %d", top.Load(), want)
		}
		for i := range writers {
			if 1+(i*7)%writers != writers {
				continue
			}
			if i%2 == 0 {
				t.wantTag(one(i))
			} else {
				t.wantTag("")
			}
		}
	}
}

func (t *suite) deletedManifest() {
	t.push(a, 1)
	t.update(func(tx names.Tx) error { return tx.PutTag(repo, "w", names.Version{Digest: a, Generation: 1}) })
	if tags, err := t.s.TagsOf(t.Context(), repo, a); err != nil || len(tags) != 2 {
		t.Errorf("tags of the manifest: %v, %v", tags, err)
	}
	var tags []names.Tagged
	t.update(func(tx names.Tx) (err error) { tags, err = tx.DeleteManifest(repo, a, 9); return err })
	slices.SortFunc(tags, func(x, y names.Tagged) int { return strings.Compare(x.Tag, y.Tag) })
	if !slices.Equal(tags, []names.Tagged{{Tag: "v", Generation: 1}, {Tag: "w", Generation: 1}}) {
		t.Errorf("tags that went: %v", tags)
	}
	t.wantTag("")
	for _, ref := range []registry.Reference{v, {Digest: a}} {
		if _, err := t.s.Manifest(t.Context(), repo, ref); !errors.Is(err, names.ErrNotFound) {
			t.Errorf("deleted manifest by %s: %v", ref, err)
		}
	}
	err := t.s.Update(t.Context(), func(tx names.Tx) error { _, err := tx.DeleteManifest(repo, a, 10); return err })
	if !errors.Is(err, names.ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
}

// A repository ends with the last that is in it.
func (t *suite) emptied() {
	t.push(a, 1)
	t.update(func(tx names.Tx) error { return tx.PutLayer(repo, b, 5, names.NoGeneration) })
	for _, step := range []struct {
		delete func(names.Tx) error
		want   bool
	}{
		{func(tx names.Tx) error { _, err := tx.DeleteManifest(repo, a, 9); return err }, true},
		{func(tx names.Tx) error { return tx.DeleteLayer(repo, b, 10) }, false},
	} {
		t.update(step.delete)
		_, err := t.s.Tags(t.Context(), repo, "", 10)
		if (err == nil) != step.want || err != nil && !errors.Is(err, names.ErrNotFound) {
			t.Errorf("tags: %v; want that the repository exists: %v", err, step.want)
		}
		if all, err := t.s.Repositories(t.Context(), "", 10); err != nil || slices.Contains(all, repo) != step.want {
			t.Errorf("repositories: %v, %v", all, err)
		}
	}
}

func (t *suite) failed() {
	no := errors.New("no")
	err := t.s.Update(t.Context(), func(tx names.Tx) error {
		return errors.Join(push(tx, a, 1), tx.PutLayer(repo, b, 1, names.NoGeneration), tx.SetMeta("k", "v"), tx.Enqueue("x", cluster.NameRecord{Generation: 5}), no)
	})
	if !errors.Is(err, no) {
		t.Errorf("update: %v", err)
	}
	if s, err := t.s.State(t.Context()); err != nil || s != (names.State{}) {
		t.Errorf("state %+v, %v", s, err)
	}
	if all, err := t.s.Repositories(t.Context(), "", 10); err != nil || len(all) != 0 {
		t.Errorf("repositories %v, %v", all, err)
	}
}

func (t *suite) canceled() {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := t.s.Update(ctx, func(tx names.Tx) error { t.Error("ran"); return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("update of a context that has ended: %v", err)
	}
}

func (t *suite) manifest() {
	want := names.Manifest{
		Repository: repo, Digest: a, MediaType: "x/y", ArtifactType: "art", Subject: b, Generation: 7, Bytes: []byte("bytes"),
	}
	t.update(func(tx names.Tx) error {
		return errors.Join(tx.PutManifest(want), tx.PutTag(repo, v.Tag, names.Version{Digest: a, Generation: 7}))
	})
	for _, ref := range []registry.Reference{v, {Digest: a}} {
		m, err := t.s.Manifest(t.Context(), repo, ref)
		if err != nil || string(m.Bytes) != string(want.Bytes) || m.Digest != a || m.Subject != b || m.ArtifactType != "art" || m.Generation != 7 {
			t.Errorf("manifest by %s: %+v, %v", ref, m, err)
		}
	}
	if m, err := t.s.StatManifest(t.Context(), repo, a); err != nil || m.Bytes != nil || m.Subject != b || m.MediaType != "x/y" || m.Digest != a {
		t.Errorf("stat: %+v, %v", m, err)
	}
	if _, err := t.s.Manifest(t.Context(), "another", registry.Reference{Digest: a}); !errors.Is(err, names.ErrNotFound) {
		t.Errorf("in another repository: %v", err)
	}
}

func (t *suite) pages() {
	t.push(a, 1)
	t.update(func(tx names.Tx) error {
		for i := range 24 {
			if err := tx.PutTag(repo, fmt.Sprintf("v%02d", (i*7)%24), names.Version{Digest: a, Generation: 1}); err != nil {
				return err
			}
			if err := tx.PutLayer(fmt.Sprintf("r%02d", (i*7)%24), a, 1, names.NoGeneration); err != nil {
				return err
			}
		}
		return nil
	})
	for what, list := range map[string]func(last string, n int) ([]string, error){
		"tags":         func(last string, n int) ([]string, error) { return t.s.Tags(t.Context(), repo, last, n) },
		"repositories": func(last string, n int) ([]string, error) { return t.s.Repositories(t.Context(), last, n) },
	} {
		var all []string
		for last := ""; ; {
			page, err := list(last, 10)
			t.must(err)
			if len(page) == 0 {
				break
			}
			all, last = append(all, page...), page[len(page)-1]
		}
		if len(all) != 25 || !slices.IsSorted(all) {
			t.Errorf("pages of %s add up to %v", what, all)
		}
	}
}

func (t *suite) referrers() {
	subject := digest.FromString("subject")
	t.update(func(tx names.Tx) error {
		for i := range 25 {
			d := one(i)
			if err := tx.PutManifest(names.Manifest{Repository: repo, Digest: d, Subject: subject, Generation: 1, Bytes: []byte(d)}); err != nil {
				return err
			}
		}
		return push(tx, a, 1)
	})
	var all []string
	for last := ""; ; {
		page, err := t.s.Referrers(t.Context(), repo, subject, last, 10)
		t.must(err)
		if len(page) == 0 {
			break
		}
		for _, m := range page {
			if string(m.Bytes) != m.Digest.String() {
				t.Errorf("referrer %s has bytes %q", m.Digest, m.Bytes)
			}
			all, last = append(all, m.Digest.String()), m.Digest.String()
		}
	}
	if len(all) != 25 || !slices.IsSorted(all) {
		t.Errorf("pages of referrers add up to %v", all)
	}
	if none, err := t.s.Referrers(t.Context(), repo, "", "", 10); err != nil || len(none) != 0 {
		t.Errorf("referrers of no subject: %v, %v", none, err)
	}
}

func (t *suite) outbox() {
	t.update(func(tx names.Tx) error {
		for i := range 3 {
			r := cluster.NameRecord{Repository: repo, Tag: fmt.Sprint(i), Bytes: []byte("x"), Signature: []byte("x"), Generation: int64(10 - i)}
			if err := tx.Enqueue("x", r); err != nil {
				return err
			}
		}
		return nil
	})
	again := t.open()
	before, err := again.State(t.Context())
	if err != nil || before.LastGeneration < 10 || before.OutboxRows != 3 {
		t.Errorf("state %+v, %v", before, err)
	}
	rows, err := again.Outbox(t.Context(), "x", 0, 2)
	if err != nil || len(rows) != 2 || rows[0].Record.Tag != "0" || rows[1].Record.Tag != "1" || rows[0].Record.Bytes != nil || rows[0].Record.Signature != nil {
		t.Fatalf("rows %+v, %v", rows, err)
	}
	if q, err := again.Queued(t.Context(), 9); err != nil || len(q) != 1 || q[0].ID != rows[1].ID {
		t.Errorf("queued %+v, %v", q, err)
	}
	key := cluster.NameKey(rows[1].Record)
	t.update(func(tx names.Tx) error {
		return tx.Enqueue("x", cluster.NameRecord{Repository: repo, Tag: "1", Generation: 7})
	})
	if s, err := again.State(t.Context()); err != nil || s.LastGeneration <= before.LastGeneration {
		t.Errorf("after a commit of an earlier generation: state %+v, %v, before %+v", s, err, before)
	}
	for before, want := range map[int64]int64{8: 7, 9: 7, 10: 9} {
		if q, err := again.QueuedBefore(t.Context(), key, before); err != nil || q.Record.Generation != want || q.Record.Tag != "1" {
			t.Errorf("queued before %d: %+v, %v, want %d", before, q, err, want)
		}
	}
	q, err := again.QueuedBefore(t.Context(), key, 8)
	t.must(err)
	t.update(func(tx names.Tx) error { return tx.Done(q.ID) })
	if q, err := again.QueuedBefore(t.Context(), key, 9); !errors.Is(err, names.ErrNotFound) {
		t.Errorf("queued before what is first: %+v, %v", q, err)
	}
	t.update(func(tx names.Tx) error {
		return errors.Join(tx.Done(rows[0].ID), tx.Done(rows[1].ID), tx.Done(rows[1].ID))
	})
	if rest, err := again.Outbox(t.Context(), "x", rows[1].ID, 10); err != nil || len(rest) != 1 || rest[0].Record.Tag != "2" {
		t.Errorf("rest %+v, %v", rest, err)
	}
	t.update(func(tx names.Tx) error {
		return errors.Join(tx.Enqueue("y", cluster.NameRecord{Tag: "of another bucket", Generation: 1}), tx.SetBucket(rows[1].ID+1, "y"), tx.SetBucket(rows[0].ID, "y"))
	})
	for bucket, want := range map[string]int{"x": 0, "y": 2, "": 0, names.AllBuckets: 2} {
		if got, err := again.Outbox(t.Context(), bucket, 0, 10); err != nil || len(got) != want || want > 0 && got[0].Bucket != "y" {
			t.Errorf("rows of bucket %q: %+v, %v; want %d", bucket, got, err, want)
		}
	}
	t.update(func(tx names.Tx) error { return errors.Join(tx.RaiseGeneration(50), tx.RaiseGeneration(40)) })
	if s, err := again.State(t.Context()); err != nil || s != (names.State{LastGeneration: 50, OutboxRows: 2}) {
		t.Errorf("state %+v, %v", s, err)
	}
}

func (t *suite) meta() {
	for _, want := range []string{"", "one", "two"} {
		if want != "" {
			t.update(func(tx names.Tx) error { return tx.SetMeta("key", want) })
		}
		if got, err := t.s.Meta(t.Context(), "key"); err != nil || got != want {
			t.Errorf("meta: %q, %v; want %q", got, err, want)
		}
	}
	t.must(t.s.Ping(t.Context()))
}

// What one store has written another one reads at once.
func (t *suite) shared() {
	other := t.open()
	t.push(a, 1)
	if m, err := other.Manifest(t.Context(), repo, v); err != nil || m.Digest != a {
		t.Errorf("through the other store: %+v, %v", m, err)
	}
}

// Entries of access are kept by kind and name, until they are deleted or have ended.
func (t *suite) access() {
	ctx := t.Context()
	put := func(es ...names.AccessEntry) {
		t.Helper()
		t.must(t.s.Update(ctx, func(tx names.Tx) error {
			for _, e := range es {
				if err := tx.PutAccess(e); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	want := func(kind string, want ...string) {
		t.Helper()
		es, err := t.s.Access(ctx, kind)
		t.must(err)
		var got []string
		for _, e := range es {
			got = append(got, fmt.Sprintf("%s %s %d", e.Name, e.Value, e.Expires))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", kind, got, want)
		}
	}
	want("robot")
	put(names.AccessEntry{Kind: "robot", Name: "b", Value: []byte("1")}, names.AccessEntry{Kind: "robot", Name: "a", Value: []byte("1"), Expires: 10})
	put(names.AccessEntry{Kind: "key", Name: "a", Value: []byte("k"), Expires: 20}, names.AccessEntry{Kind: "robot", Name: "b", Value: []byte("2"), Expires: 30})
	want("robot", "a 1 10", "b 2 30")
	want("key", "a k 20")
	t.must(t.s.Update(ctx, func(tx names.Tx) error { return tx.DropAccess(20) }))
	want("robot", "b 2 30")
	want("key", "a k 20")
	t.must(t.s.Update(ctx, func(tx names.Tx) error { return tx.DeleteAccess("robot", "b") }))
	want("robot")
	if err := t.s.Update(ctx, func(tx names.Tx) error { return tx.DeleteAccess("robot", "b") }); !errors.Is(err, names.ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
}

// The repositories of a blob come in pages.
func (t *suite) layerRepositories() {
	ctx := t.Context()
	t.must(t.s.Update(ctx, func(tx names.Tx) error {
		return errors.Join(tx.PutLayer("c", a, 1, 1), tx.PutLayer("a", a, 1, 2), tx.PutLayer("b", b, 1, 3), tx.PutLayer("b", a, 1, 4))
	}))
	for last, want := range map[string][]string{"": {"a", "b"}, "b": {"c"}, "c": nil} {
		got, err := t.s.LayerRepositories(ctx, a, last, 2)
		t.must(err)
		if !slices.Equal(got, want) {
			t.Errorf("after %q: %q, want %q", last, got, want)
		}
	}
}

// What was refused is remembered until it is dropped, each generation for itself.
func (t *suite) refused() {
	a := names.Refused{Repository: repo, Key: "aa", Generation: 9, Since: 1}
	b := names.Refused{Repository: repo, Key: "aa", Generation: 10, Since: 2}
	again := a
	again.Since = 3
	t.update(func(tx names.Tx) error {
		return errors.Join(tx.PutRefused(b), tx.PutRefused(a), tx.PutRefused(again))
	})
	want := func(want ...names.Refused) {
		t.Helper()
		if got, err := t.s.Refused(t.Context()); err != nil || !slices.Equal(got, want) {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	want(a, b)
	t.update(func(tx names.Tx) error { return errors.Join(tx.DropRefused("aa", 9), tx.DropRefused("aa", 11)) })
	want(b)
}
