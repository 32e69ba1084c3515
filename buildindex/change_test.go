package buildindex

import (
	"errors"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/buildindex/names/sqlite"
	"kraken/proto/registry"
)

// What another process writes after a change was looked at, and before it is written, is seen by the write: the change
// is refused as if it had come later, and its records are taken back.
func TestAnotherProcessComesBetween(t *testing.T) {
	a, b := raw("", "a/a"), raw("", "b/b")
	da, db := digest.FromBytes(a), digest.FromBytes(b)
	v := registry.Reference{Tag: "v1"}
	other := digest.FromString("another process")
	move := func(tx names.Tx) error {
		m := names.Manifest{Repository: "repo", Digest: other, Generation: 1, Bytes: []byte("x")}
		return errors.Join(tx.PutManifest(m), tx.PutTag("repo", v.Tag, names.Version{Digest: other, Generation: 1}))
	}
	push := func(o registry.PutOptions) func(*rig) error {
		return func(r *rig) error { _, err := r.push("repo", v, b, o); return err }
	}
	remove := func(ref registry.Reference) func(*rig) error {
		return func(r *rig) error { return r.x.DeleteManifest(r.Context(), "repo", ref) }
	}
	later := time.Now().Add(time.Minute).UnixMicro()
	for name, c := range map[string]struct {
		before    bool // the tag is a before
		immutable string
		change    func(*rig) error
		between   func(names.Tx) error
		want      error
	}{
		"compare and swap": {before: true, change: push(registry.PutOptions{IfMatch: []digest.Digest{da}}), between: func(tx names.Tx) error {
			return errors.Join(tx.DeleteTag("repo", v.Tag, later), tx.RaiseGeneration(later))
		}, want: registry.ErrPrecondition},
		"if none match":   {change: push(registry.PutOptions{IfAbsent: true}), between: move, want: registry.ErrPrecondition},
		"immutable tag":   {immutable: "v.*", change: push(registry.PutOptions{}), between: move, want: registry.ErrDenied},
		"newer tombstone": {before: true, change: push(registry.PutOptions{}), between: func(tx names.Tx) error { return tx.DeleteTag("repo", v.Tag, later) }, want: registry.ErrUnavailable},
		"deleted twice":   {before: true, change: remove(v), between: func(tx names.Tx) error { return tx.DeleteTag("repo", v.Tag, 1<<62) }, want: registry.ErrManifestUnknown},
		"immutable tag of a deleted manifest": {before: true, immutable: "w.*", change: remove(registry.Reference{Digest: da}), between: func(tx names.Tx) error {
			return tx.PutTag("repo", "w1", names.Version{Digest: da, Generation: 1})
		}, want: registry.ErrDenied},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.x.cfg.Repositories = []Policy{{Match: ".*", ImmutableTags: c.immutable}}
			r.must(r.x.cfg.Validate())
			r.must(r.x.fill(t.Context()))
			if c.before {
				_, err := r.push("repo", v, a, registry.PutOptions{})
				r.must(err)
			}
			kept := r.origins[0].kept()
			process, err := sqlite.Open(t.Context(), filepath.Join(r.dir, "first.db"))
			r.must(err)
			defer process.Close()
			between := sync.OnceValue(func() error { return process.Update(t.Context(), c.between) })
			for _, o := range r.origins {
				o.set(func() { o.onPut = func() { r.must(between()) } })
			}
			if err := c.change(r); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			r.wantManifest(db, false)
			if n := r.origins[0].kept(); n != kept {
				t.Errorf("origins keep %d records, %d before", n, kept)
			}
			if c.want == registry.ErrUnavailable { // then what is tried again gets a generation that is high enough
				r.must(c.change(r))
				r.wantTag(v.Tag, db)
			}
		})
	}
}
