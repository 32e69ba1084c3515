package namestest

import (
	"errors"
	"reflect"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// mirror is that what upstreams said is kept, the last of it, and is nobody's own name.
func (t *suite) mirror() {
	const up = "docker.io/library/nginx"
	at := time.UnixMilli(1_800_000_000_123)
	m := names.Manifest{Repository: up, Digest: a, MediaType: "x/y", ArtifactType: "z", Subject: b, Bytes: []byte("bytes")}
	list := names.MirroredReferrers{Descriptors: []v1.Descriptor{{MediaType: "x/y", Digest: b, Size: 3, Annotations: map[string]string{"k": "v"}}}, Checked: at}
	for range 2 {
		t.update(func(tx names.Tx) error {
			return errors.Join(tx.PutMirroredManifest(m, []names.Member{{Digest: b, Size: 7}, {Digest: a, Size: 8}}), tx.PutMirroredTag(up, "v", names.MirroredTag{Digest: b, Checked: at}),
				tx.PutMirroredTag(up, "w", names.MirroredTag{Digest: b, Checked: at}), tx.PutMirroredReferrers(up, a, list))
		})
	}
	later := names.MirroredTag{Digest: a, Checked: at.Add(time.Minute)}
	t.update(func(tx names.Tx) error { return tx.PutMirroredTag(up, "v", later) })
	t.must(t.s.Close())
	t.s = t.open()
	if got, err := t.s.MirroredTag(t.Context(), up, "v"); err != nil || got.Digest != a || !got.Checked.Equal(later.Checked) {
		t.Errorf("tag: %+v, %v", got, err)
	}
	if got, err := t.s.MirroredManifest(t.Context(), up, a); err != nil || !reflect.DeepEqual(got, m) {
		t.Errorf("manifest: %+v, %v", got, err)
	}
	if got, err := t.s.MirroredLayer(t.Context(), up, b); err != nil || got != (names.MirroredLayer{Size: 7}) {
		t.Errorf("layer: %+v, %v", got, err)
	}
	if got, err := t.s.MirroredReferrers(t.Context(), up, a); err != nil || !got.Checked.Equal(at) || !reflect.DeepEqual(got.Descriptors, list.Descriptors) {
		t.Errorf("referrers: %+v, %v", got, err)
	}
	if got, err := t.s.MirroredTags(t.Context(), up, "v", 10); err != nil || !slices.Equal(got, []string{"w"}) {
		t.Errorf("tags: %v, %v", got, err)
	}
	for what, f := range map[string]func() error{
		"own manifest": func() error { _, err := t.s.Manifest(t.Context(), up, registry.Reference{Digest: a}); return err },
		"own tag":      func() error { _, err := t.s.Tag(t.Context(), up, "v"); return err },
		"own layer":    func() error { _, err := t.s.Layer(t.Context(), "", b); return err },
		"elsewhere":    func() error { _, err := t.s.MirroredLayer(t.Context(), repo, b); return err },
		"no list":      func() error { _, err := t.s.MirroredReferrers(t.Context(), up, b); return err },
	} {
		if err := f(); !errors.Is(err, names.ErrNotFound) {
			t.Errorf("%s: %v", what, err)
		}
	}
	t.unwritten(up)
	t.holders(up)
	t.update(func(tx names.Tx) error {
		return errors.Join(tx.DeleteMirroredTag(up, "v"), tx.DeleteMirroredTag(up, "never"))
	})
	if _, err := t.s.MirroredTag(t.Context(), up, "v"); !errors.Is(err, names.ErrNotFound) {
		t.Errorf("deleted: %v", err)
	}
}

// holders is that a claim and a proof are told apart, and that all repositories that have or claim b are found, be it
// as a manifest.
func (t *suite) holders(up string) {
	want := func(last string, n int, want ...string) {
		t.Helper()
		if got, err := t.s.BlobHolders(t.Context(), b, last, n); err != nil || !slices.Equal(got, want) {
			t.Errorf("after %q: %v, %v, want %v", last, got, err, want)
		}
	}
	manifest := func(repo string) names.Manifest {
		return names.Manifest{Repository: repo, Digest: b, MediaType: "x/y", Generation: 1, Bytes: []byte("x")}
	}
	const proved = "quay.io/x/y"
	want("", 10, up)
	t.update(func(tx names.Tx) error {
		return errors.Join(tx.ProveMirrored(proved, names.Member{Digest: b, Size: 6}), tx.PutLayer("z/own", b, 7, 1), tx.ProveMirrored(up, names.Member{Digest: b, Size: 9}))
	})
	want("", 10, up, proved, "z/own")
	want("", 2, up, proved)
	want(proved, 2, "z/own")
	for repo, size := range map[string]int64{proved: 6, up: 9} {
		if got, err := t.s.MirroredLayer(t.Context(), repo, b); err != nil || got != (names.MirroredLayer{Size: size, Proved: true}) {
			t.Errorf("%s: %+v, %v", repo, got, err)
		}
	}
	t.update(func(tx names.Tx) error {
		return errors.Join(tx.DeleteLayer("z/own", b, 2), tx.PutManifest(manifest("y/own")), tx.PutMirroredManifest(manifest("quay.io/z/z"), nil))
	})
	want("", 10, up, proved, "quay.io/z/z", "y/own")
	want(proved, 1, "quay.io/z/z")
}

// unwritten is that what the cluster's own names lack of mirrored ones is found, a of repository up with tag v.
func (t *suite) unwritten(up string) {
	want := func(when string, manifests, tags []cluster.Name) {
		t.Helper()
		if got, err := t.s.MirroredUnwritten(t.Context(), cluster.Name{}, 10); err != nil || !slices.Equal(got, manifests) {
			t.Errorf("%s: manifests %v, %v", when, got, err)
		}
		if got, err := t.s.MirroredTagsUnwritten(t.Context(), cluster.Name{}, 10); err != nil || !slices.Equal(got, tags) {
			t.Errorf("%s: tags %v, %v", when, got, err)
		}
	}
	own := func(d digest.Digest) func(names.Tx) error {
		return func(tx names.Tx) error {
			return tx.PutManifest(names.Manifest{Repository: up, Digest: d, MediaType: "x/y", Generation: 5, Bytes: []byte(d)})
		}
	}
	n, tag := cluster.ManifestName(up, a), cluster.TagName(up, "v")
	want("nothing is written", []cluster.Name{n}, nil)
	if got, err := t.s.MirroredUnwritten(t.Context(), n, 10); err != nil || len(got) != 0 {
		t.Errorf("after the last: %v, %v", got, err)
	}
	t.update(own(a))
	want("the manifest is written", nil, []cluster.Name{tag})
	t.update(func(tx names.Tx) error {
		return errors.Join(own(b)(tx), tx.PutTag(up, "v", names.Version{Digest: b, Generation: 6}))
	})
	want("the tag is another", nil, []cluster.Name{tag, cluster.TagName(up, "w")})
	if got, err := t.s.MirroredTagsUnwritten(t.Context(), tag, 10); err != nil || !slices.Equal(got, []cluster.Name{cluster.TagName(up, "w")}) {
		t.Errorf("after a tag: %v, %v", got, err)
	}
	t.update(func(tx names.Tx) error { return tx.PutTag(up, "v", names.Version{Digest: a, Generation: 7}) })
	want("the tag is written", nil, []cluster.Name{cluster.TagName(up, "w")})
}

// prunedMirror is that what was used least recently goes first, with what is about it.
func (t *suite) prunedMirror() {
	const up, other = "docker.io/library/nginx", "docker.io/library/redis"
	ds := []digest.Digest{one(1), one(2), one(3)}
	put := func(repo string, d digest.Digest, at int64) {
		t.Helper()
		t.update(func(tx names.Tx) error {
			return errors.Join(tx.PutMirroredManifest(names.Manifest{Repository: repo, Digest: d, Bytes: []byte("12345")}, []names.Member{{Digest: d, Size: 1}}),
				tx.PutMirroredTag(repo, "t"+d.Encoded()[:5], names.MirroredTag{Digest: d}), tx.PutMirroredReferrers(repo, d, names.MirroredReferrers{}),
				tx.UseMirrored(repo, d, time.Now().Add(time.Duration(at)*time.Hour)))
		})
	}
	put(up, ds[0], 3)
	put(up, ds[1], 1)
	put(other, ds[2], 2)
	t.update(func(tx names.Tx) error { return tx.UseMirrored(up, one(9), time.Now()) })
	const proof, list = int64(names.MirroredRow), int64(names.MirroredRow + len("null"))
	size := func(want int64) {
		t.Helper()
		if n, err := t.s.MirroredBytes(t.Context()); err != nil || n != want {
			t.Errorf("%d bytes, %v, want %d", n, err, want)
		}
	}
	size(15 + 3*list)
	prune := func(n, want int) {
		t.Helper()
		t.update(func(tx names.Tx) error {
			if got, err := tx.PruneMirrored(n); err != nil || got != want {
				t.Errorf("%d pruned, %v, want %d", got, err, want)
			}
			return nil
		})
	}
	there := func(repo string, d digest.Digest, manifest, layer bool) {
		t.Helper()
		_, merr := t.s.MirroredManifest(t.Context(), repo, d)
		_, terr := t.s.MirroredTag(t.Context(), repo, "t"+d.Encoded()[:5])
		_, rerr := t.s.MirroredReferrers(t.Context(), repo, d)
		_, lerr := t.s.MirroredLayer(t.Context(), repo, d)
		for what, err := range map[string]error{"manifest": merr, "tag": terr, "referrers": rerr} {
			if (err == nil) != manifest {
				t.Errorf("%s of %s: %v", what, repo, err)
			}
		}
		if (lerr == nil) != layer {
			t.Errorf("layer of %s: %v", repo, lerr)
		}
	}
	prune(2, 2)
	size(5 + list)
	there(up, ds[0], true, true)
	there(up, ds[1], false, false)
	there(other, ds[2], false, false)
	t.update(func(tx names.Tx) error {
		return errors.Join(tx.PutMirroredReferrers(up, ds[1], names.MirroredReferrers{}), tx.ProveMirrored(up, names.Member{Digest: ds[1]}), tx.ProveMirrored(up, names.Member{Digest: ds[2]}),
			tx.UseMirrored(up, ds[2], time.Now().Add(9*time.Hour)))
	})
	size(5 + 2*list + 2*proof)
	prune(1, 3) // of proofs and lists what was used before
	size(proof)
	there(up, ds[0], false, false)
	prune(10, 1)
	prune(10, 0)
	size(0)
}
