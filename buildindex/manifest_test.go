package buildindex

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/registry"
)

// raw is an image manifest without references of its own; lax repositories take it.
func raw(subject digest.Digest, artifactType string) []byte {
	m := map[string]any{
		"schemaVersion": 2, "mediaType": v1.MediaTypeImageManifest, "artifactType": artifactType,
		"config": v1.DescriptorEmptyJSON, "layers": []v1.Descriptor{},
	}
	if subject != "" {
		m["subject"] = v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: subject, Size: 10}
	}
	b, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	return b
}

func (r *rig) push(repo string, ref registry.Reference, b []byte, o registry.PutOptions) (registry.PutResult, error) {
	return r.x.PutManifest(r.Context(), repo, ref, "", b, o)
}

// While names are being restored, what SQL does not have yet may exist: no list is whole, no condition known to hold,
// and no immutable tag known to be free.
func TestNotKnownYet(t *testing.T) {
	r := newRig(t)
	r.x.cfg.Repositories = []Policy{{Match: "repo", ImmutableTags: "v.*"}}
	r.must(r.x.cfg.Validate())
	a, b := raw("", "a/a"), raw("", "b/b")
	gone := digest.FromBytes(b)
	tag := func(tag string, o registry.PutOptions) func() error {
		return func() error { _, err := r.push("repo", registry.Reference{Tag: tag}, a, o); return err }
	}
	steps := map[string]func() error{
		"push of an immutable tag": tag("v1", registry.PutOptions{}),
		"push of a new tag":        tag("latest", registry.PutOptions{IfAbsent: true}),
		"delete by digest": func() error {
			return r.x.DeleteManifest(t.Context(), "repo", registry.Reference{Digest: gone})
		},
		"tags":    func() error { _, err := r.x.ListTags(t.Context(), "repo", registry.Page{N: -1}); return err },
		"catalog": func() error { _, err := r.x.ListRepositories(t.Context(), registry.Page{N: -1}); return err },
		"referrers": func() error {
			_, err := r.x.ListReferrers(t.Context(), "repo", digest.FromBytes(a), "", "")
			return err
		},
	}
	r.must(tag("other", registry.PutOptions{})()) // pushes go on
	if _, err := r.push("repo", registry.Reference{Digest: gone}, b, registry.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	for name, step := range steps {
		if err := step(); !errors.Is(err, registry.ErrUnavailable) {
			t.Errorf("%s: %v, want ErrUnavailable", name, err)
		}
	}
	r.wantTag("v1", "")
	r.wantTag("latest", "")
	r.must(r.x.fill(t.Context()))
	for name, step := range steps {
		if err := step(); err != nil {
			t.Errorf("%s, restored: %v", name, err)
		}
	}
}

func TestConditionsOnTags(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(t.Context()))
	a, b := raw("", "a/a"), raw("", "b/b")
	da, db := digest.FromBytes(a), digest.FromBytes(b)
	v := registry.Reference{Tag: "v"}
	for i, step := range []struct {
		raw  []byte
		o    registry.PutOptions
		want error
	}{
		{a, registry.PutOptions{IfExists: true}, registry.ErrPrecondition},
		{a, registry.PutOptions{IfMatch: []digest.Digest{da}}, registry.ErrPrecondition},
		{a, registry.PutOptions{IfAbsent: true}, nil},
		{b, registry.PutOptions{IfAbsent: true}, registry.ErrPrecondition},
		{b, registry.PutOptions{IfMatch: []digest.Digest{db}}, registry.ErrPrecondition},
		{b, registry.PutOptions{IfMatch: []digest.Digest{}}, registry.ErrPrecondition},
		{b, registry.PutOptions{IfMatch: []digest.Digest{db, da}}, nil},
		{a, registry.PutOptions{IfNoneMatch: []digest.Digest{da, db}}, registry.ErrPrecondition},
		{a, registry.PutOptions{IfNoneMatch: []digest.Digest{da}}, nil},
		{a, registry.PutOptions{IfNoneMatch: []digest.Digest{da}}, registry.ErrPrecondition},
		{b, registry.PutOptions{IfMatch: []digest.Digest{da}, IfNoneMatch: []digest.Digest{da}}, registry.ErrPrecondition},
		{a, registry.PutOptions{IfExists: true, IfNoneMatch: []digest.Digest{db}}, nil},
	} {
		if _, err := r.push("repo", v, step.raw, step.o); !errors.Is(err, step.want) {
			t.Errorf("step %d: %v, want %v", i, err, step.want)
		}
	}
	r.wantTag("v", da)
}

// Without a tag the conditions are on the manifest that is pushed.
func TestConditionsOnManifests(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(t.Context()))
	b := raw("", "a/a")
	d := digest.FromBytes(b)
	for i, step := range []struct {
		o    registry.PutOptions
		want error
	}{
		{registry.PutOptions{IfExists: true}, registry.ErrPrecondition},
		{registry.PutOptions{IfMatch: []digest.Digest{d}}, registry.ErrPrecondition},
		{registry.PutOptions{IfAbsent: true, IfNoneMatch: []digest.Digest{d}}, nil},
		{registry.PutOptions{IfAbsent: true}, registry.ErrPrecondition},
		{registry.PutOptions{IfNoneMatch: []digest.Digest{d}}, registry.ErrPrecondition},
		{registry.PutOptions{IfMatch: []digest.Digest{d}}, nil},
		{registry.PutOptions{IfExists: true}, nil},
		{registry.PutOptions{IfAbsent: true, Tags: []string{"v"}}, nil}, // on the tag
	} {
		if _, err := r.push("repo", registry.Reference{Digest: d}, b, step.o); !errors.Is(err, step.want) {
			t.Errorf("step %d: %v, want %v", i, err, step.want)
		}
	}
	r.wantTag("v", d)
}

// Tags that go with a push by digest are set together or not at all.
func TestTagParameters(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(t.Context()))
	a, b := raw("", "a/a"), raw("", "b/b")
	da, db := digest.FromBytes(a), digest.FromBytes(b)
	res, err := r.push("repo", registry.Reference{Digest: da}, a, registry.PutOptions{Tags: []string{"v1", "v2"}})
	if err != nil || !slices.Equal(res.Tags, []string{"v1", "v2"}) {
		t.Fatalf("%+v, %v", res, err)
	}
	r.wantTag("v1", da)
	r.wantTag("v2", da)
	_, err = r.push("repo", registry.Reference{Digest: db}, b, registry.PutOptions{Tags: []string{"v3", "v1"}, IfAbsent: true})
	if !errors.Is(err, registry.ErrPrecondition) {
		t.Errorf("%v, want ErrPrecondition", err)
	}
	r.wantTag("v3", "")
	r.wantManifest(db, false)
	r.lose()
	r.wantTag("v1", da)
	r.wantTag("v2", da)
}

func TestImmutableTags(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(t.Context()))
	r.x.cfg.Repositories = []Policy{{Match: "release/.*", ImmutableTags: "v.*"}}
	if err := r.x.cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	const repo = "release/app"
	a, b := raw("", "a/a"), raw("", "b/b")
	v, latest := registry.Reference{Tag: "v1"}, registry.Reference{Tag: "latest"}
	for _, ref := range []registry.Reference{v, v, latest} {
		if _, err := r.push(repo, ref, a, registry.PutOptions{}); err != nil {
			t.Fatalf("push %s: %v", ref, err)
		}
	}
	if _, err := r.push(repo, latest, b, registry.PutOptions{}); err != nil {
		t.Errorf("a tag that may move: %v", err)
	}
	if _, err := r.push(repo, v, b, registry.PutOptions{}); !errors.Is(err, registry.ErrDenied) {
		t.Errorf("move an immutable tag: %v, want ErrDenied", err)
	}
	if _, err := r.push(repo, registry.Reference{Digest: digest.FromBytes(b)}, b, registry.PutOptions{Tags: []string{"x", "v1"}}); !errors.Is(err, registry.ErrDenied) {
		t.Errorf("move it by a parameter: %v, want ErrDenied", err)
	}
	for _, ref := range []registry.Reference{v, {Digest: digest.FromBytes(a)}} {
		if err := r.x.DeleteManifest(t.Context(), repo, ref); !errors.Is(err, registry.ErrDenied) {
			t.Errorf("delete %s: %v, want ErrDenied", ref, err)
		}
	}
	if err := r.x.DeleteManifest(t.Context(), repo, registry.Reference{Digest: digest.FromBytes(b)}); err != nil {
		t.Errorf("delete what no immutable tag names: %v", err)
	}
}

// What clients listed under the tag schema is listed by the API as well, once, filtered, and only while it exists.
func TestReferrersTagSchema(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(t.Context()))
	subject := digest.FromString("subject")
	byAPI, byTag, gone := raw(subject, "a/api"), raw("", "a/tag"), raw("", "a/gone")
	var children []v1.Descriptor
	for _, b := range [][]byte{byAPI, byTag, gone} {
		if _, err := r.push("repo", registry.Reference{Digest: digest.FromBytes(b)}, b, registry.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		var m v1.Manifest
		r.must(json.Unmarshal(b, &m))
		children = append(children, v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromBytes(b), Size: int64(len(b)), ArtifactType: m.ArtifactType})
	}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": v1.MediaTypeImageIndex, "manifests": children})
	r.must(err)
	if _, err := r.push("repo", registry.Reference{Tag: fallbackTag(subject)}, index, registry.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	r.delete(registry.Reference{Digest: digest.FromBytes(gone)})
	for filter, want := range map[string][]string{"": {"a/api", "a/tag"}, "a/tag": {"a/tag"}, "a/gone": nil} {
		p, err := r.x.ListReferrers(t.Context(), "repo", subject, filter, "")
		var got []string
		for _, d := range p.Descriptors {
			got = append(got, d.ArtifactType)
		}
		slices.Sort(got)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("filter %q: %v, %v, want %v", filter, got, err, want)
		}
	}
}

// Referrers come in pages, each once.
func TestReferrersInPages(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(t.Context()))
	subject := digest.FromString("subject")
	const n = referrersPage + 5
	for i := range n {
		if _, err := r.push("repo", registry.Reference{Tag: fmt.Sprintf("t%d", i)}, raw(subject, fmt.Sprintf("a/%d", i)), registry.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	seen := map[digest.Digest]int{}
	cursor, pages := "", 0
	for {
		p, err := r.x.ListReferrers(t.Context(), "repo", subject, "", cursor)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range p.Descriptors {
			seen[d.Digest]++
		}
		if pages++; p.Next == "" {
			break
		}
		cursor = p.Next
	}
	if len(seen) != n || pages != 2 {
		t.Errorf("%d referrers in %d pages, want %d in 2", len(seen), pages, n)
	}
}
