package buildindex

import (
	"errors"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// refusedPush has a push of v1 refused although the last origin, which has its record, died with it: by 412, because
// the tag is moved meanwhile, or where it is short, by 503, because few origins keep it and the bucket is known to be
// away. It returns what the tag is.
func refusedPush(r *rig, short bool) (was digest.Digest) {
	r.Helper()
	a, b := raw("", "a/a"), raw("", "b/b")
	v := registry.Reference{Tag: "v1"}
	_, err := r.push("repo", v, a, registry.PutOptions{})
	r.must(err)
	was = digest.FromBytes(a)
	want := registry.ErrPrecondition
	between := sync.OnceFunc(func() {
		if short {
			return
		}
		// As by a record that is taken over.
		was = digest.FromString("moved")
		at, err := r.x.nextGeneration()
		r.must(err)
		r.must(r.x.db.Update(r.Context(), func(tx names.Tx) error {
			m := names.Manifest{Repository: "repo", Digest: was, Generation: at, Bytes: []byte("x")}
			return errors.Join(tx.PutManifest(m), tx.PutTag("repo", v.Tag, names.Version{Digest: was, Generation: at}))
		}))
	})
	if short {
		want = registry.ErrUnavailable
		r.x.lanes[0].state = bucket.Down
	}
	for i, o := range r.origins {
		o.set(func() {
			o.onPut = func() {
				between()
				if i < len(r.origins)-1 {
					return
				}
				o.down = true
				if short {
					panic(http.ErrAbortHandler)
				}
			}
		})
	}
	if _, err := r.push("repo", v, b, registry.PutOptions{IfMatch: []digest.Digest{digest.FromBytes(a)}}); !errors.Is(err, want) {
		r.Fatalf("the push: %v, want %v", err, want)
	}
	for _, o := range r.origins {
		o.set(func() { o.onPut, o.down = nil, false })
	}
	r.x.writing = writing{} // as after a while
	return was
}

// A change that was refused does not come true when an origin is heard that had got its record and died: neither in the
// process that refused it, nor in the next one, nor in one that has lost the database. What was noted of it goes once
// all origins were heard without it.
func TestRefusedChangeDoesNotComeTrue(t *testing.T) {
	for _, short := range []bool{false, true} {
		for name, next := range map[string]func(r *rig){
			"this process": func(*rig) {},
			"the next":     func(r *rig) { r.start("first.db") },
			"lost":         func(r *rig) { r.start("second.db") },
			"lost, and heard later": func(r *rig) {
				last := r.origins[len(r.origins)-1]
				last.set(func() { last.down = true })
				r.start("second.db")
				_ = r.x.fill(r.Context())
				last.set(func() { last.down = false })
			},
		} {
			t.Run(map[bool]string{false: "condition, ", true: "bucket away, "}[short]+name, func(t *testing.T) {
				r := newRig(t)
				r.must(r.x.fill(t.Context()))
				was := refusedPush(r, short)
				last := r.origins[len(r.origins)-1]
				got := digest.FromBytes(raw("", "b/b"))
				if has := last.keeps(got); !has {
					t.Fatal("the origin that died has no record of what was refused")
				}
				next(r)
				r.must(r.x.fill(t.Context()))
				r.must(r.x.reconcile(t.Context(), r.x.origins.All()))
				r.wantManifest(got, false)
				now, err := r.x.db.Tag(t.Context(), "repo", "v1")
				if ignoreMissing(err) != nil || now.Digest == got || short && now.Digest != was {
					t.Errorf("v1 is %s, %v; it was %s", now.Digest, err, was)
				}
				if last.keeps(got) {
					t.Error("the origin still has the record")
				}
				r.wantAside(0)
				r.pastRefusals()
				r.must(r.x.reconcile(t.Context(), r.x.origins.All()))
				if left, err := r.x.db.Refused(t.Context()); err != nil || len(left) != 0 {
					t.Errorf("%d refusals stay noted, %v", len(left), err)
				}
				for _, o := range r.origins {
					if o.refusals() != 0 {
						t.Error("an origin keeps a refusal")
					}
				}
			})
		}
	}
}

// A push that is refused does not take the record of an earlier one with it, which says the same and was acknowledged:
// the bucket lacks it, and SQL may be lost.
func TestRefusedChangeLeavesTheOneBefore(t *testing.T) {
	for name, c := range map[string]struct{ first, refused func(r *rig) error }{
		"a tag again": {
			func(r *rig) error { return r.tagged("v1") },
			func(r *rig) error { return r.tagged("v1") },
		},
		"a tag that has moved": {
			func(r *rig) error {
				err := r.tagged("v1", "v2")
				_, other := r.push("repo", registry.Reference{Tag: "v1"}, raw("", "c/c"), registry.PutOptions{})
				return errors.Join(err, other)
			},
			func(r *rig) error { return r.tagged("v1") },
		},
		"a digest": {
			func(r *rig) error { return r.tagged("") },
			func(r *rig) error { return r.tagged("") },
		},
		"the second of two tags": {
			func(r *rig) error { return r.tagged("v1", "v2") },
			func(r *rig) error { return r.tagged("v2") },
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.must(r.x.fill(t.Context()))
			r.must(c.first(r))
			a := digest.FromBytes(raw("", "a/a"))
			want, err := r.x.now(t.Context(), "repo", registry.Reference{Tag: "v1"})
			r.must(err)
			r.origins[1].set(func() { r.origins[1].down = true })
			r.x.lanes[0].state = bucket.Down
			if err := c.refused(r); !errors.Is(err, registry.ErrUnavailable) {
				t.Fatalf("the second push: %v", err)
			}
			r.start("second.db")
			_ = r.x.fill(t.Context())
			r.wantManifest(a, true)
			r.wantTag("v1", want.Digest)
		})
	}
}

// tagged pushes a manifest by digest with tags.
func (r *rig) tagged(tags ...string) error {
	b := raw("", "a/a")
	if tags[0] == "" {
		tags = nil
	}
	_, err := r.push("repo", registry.Reference{Digest: digest.FromBytes(b)}, b, registry.PutOptions{Tags: tags})
	return err
}

// A refusal that can't be noted, because too many are, is none: the change may yet come, and the client is told so.
func TestTooManyRefusals(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(t.Context()))
	r.must(r.x.db.Update(t.Context(), func(tx names.Tx) error {
		for i := range int64(maxRefusals) {
			if err := tx.PutRefused(names.Refused{Repository: "repo", Key: "a", Generation: i + 1}); err != nil {
				return err
			}
		}
		return nil
	}))
	rec := cluster.NewRecord(cluster.DeleteName(cluster.TagName("repo", "v")).At(1), time.Now())
	r.origins[1].set(func() { r.origins[1].down = true })
	err := r.x.takeBack(t.Context(), []cluster.NameRecord{rec}, registry.ErrPrecondition)
	if !errors.Is(err, registry.ErrTooFewCopies) || errors.Is(err, registry.ErrPrecondition) {
		t.Errorf("%v, want %v", err, registry.ErrTooFewCopies)
	}
}

// pastRefusals makes what was refused long ago.
func (r *rig) pastRefusals() {
	r.Helper()
	all, err := r.x.db.Refused(r.Context())
	r.must(err)
	r.must(r.x.db.Update(r.Context(), func(tx names.Tx) error {
		for _, n := range all {
			r.must(tx.DropRefused(n.Key, n.Generation))
			n.Since -= (refusedFor + time.Second).Milliseconds()
			r.must(tx.PutRefused(n))
		}
		return nil
	}))
}

// keeps reports whether there is a record of a push of this manifest.
func (f *fakeOrigin) keeps(d digest.Digest) (has bool) {
	f.set(func() {
		for _, rec := range f.names {
			has = has || rec.Digest == d && rec.Change().PutsManifest()
		}
	})
	return has
}

// refusals is how many are kept.
func (f *fakeOrigin) refusals() (n int) {
	f.set(func() {
		for _, rec := range f.names {
			if _, ok := rec.Refuses(); ok {
				n++
			}
		}
	})
	return n
}
