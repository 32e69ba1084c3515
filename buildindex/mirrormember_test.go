package buildindex

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	script "kraken/test/upstream"
)

// claim puts a manifest into an upstream's repository that names blobs which need not be there.
func claim(t *testing.T, u *script.Registry, repo, tag string, blobs ...v1.Descriptor) v1.Descriptor {
	t.Helper()
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: u.PutBlob(repo, []byte(`{"of":"`+repo+`"}`)), Layers: blobs}
	m.SchemaVersion = 2
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return u.PutManifest(repo, tag, v1.MediaTypeImageManifest, b)
}

func layerOf(b []byte) v1.Descriptor {
	return v1.Descriptor{MediaType: v1.MediaTypeImageLayerGzip, Digest: digest.FromBytes(b), Size: int64(len(b))}
}

// askMembers asks which of some blobs a repository has, as an agent does when a manifest passes by.
func (r *rig) askMembers(ctx context.Context, repo string, ds ...digest.Digest) []digest.Digest {
	r.Helper()
	body, err := json.Marshal(cluster.Members{Digests: ds})
	r.must(err)
	w := httptest.NewRecorder()
	r.must(r.x.members(w, httptest.NewRequestWithContext(ctx, http.MethodPost, "/", bytes.NewReader(body)), registry.ExtensionPath{Repository: repo}))
	var out cluster.Members
	r.must(json.Unmarshal(w.Body.Bytes(), &out))
	return out.Digests
}

func (r *rig) wantMember(ctx context.Context, repo string, d digest.Digest, want error) {
	r.Helper()
	if _, err := r.x.getLayer(ctx, repo, d); !errors.Is(err, want) || want == nil && err != nil {
		r.Errorf("%s of %s: %v, want %v", d, repo, err, want)
	}
	if err := r.x.mirror.granted(ctx, repo, d); !errors.Is(err, want) || want == nil && err != nil {
		r.Errorf("%s of %s, to be read: %v, want %v", d, repo, err, want)
	}
	if err := r.x.mirror.granted(ctx, repo, d); want == nil && err == nil {
		if got := r.askMembers(ctx, repo, d); len(got) != 1 {
			r.Errorf("%s of %s is no member", d, repo)
		}
	} else if got := r.askMembers(ctx, repo, d); len(got) != 0 {
		r.Errorf("%s of %s is a member", d, repo)
	}
}

// Layers that no registry keeps, and blobs that are in the manifest itself, are no members: nobody looks whether the
// repository has them.
func TestForeignAndInlineAreNoMembers(t *testing.T) {
	u := script.New(t, script.Options{})
	foreign, inline, both := layerOf([]byte("foreign")), layerOf([]byte("inline")), layerOf([]byte("both"))
	foreign.MediaType, inline.Data = registry.MediaTypeDockerForeignLayer, []byte("inline")
	both.MediaType, both.Data = registry.MediaTypeDockerForeignLayer, []byte("both")
	m := claim(t, u, "app", "v1", foreign, inline, both)
	r := newMirrorRig(t, mirrored(u))
	r.must(r.x.fill(t.Context()))
	repo := u.Alias + "/app"
	r.wantMirrored(repo, "v1", m.Digest, false)
	for _, d := range []v1.Descriptor{foreign, inline, both} {
		r.wantMember(t.Context(), repo, d.Digest, registry.ErrBlobUnknown)
	}
	r.old(0)
	u.PutBlob("app", []byte("foreign"))
	r.must(r.x.mirror.granted(t.Context(), repo, foreign.Digest)) // the registry keeps this one
	r.wantMember(t.Context(), repo, foreign.Digest, nil)
}

// An upstream's manifest that names a blob of the cluster's own makes it no member of the upstream's repository, in
// whatever order they come, until the upstream has said that it has it. Who shares blobs with other public repositories
// costs no question.
func TestClaimIsNoMembership(t *testing.T) {
	u := script.New(t, script.Options{})
	secret, later, base, shared := []byte("secret"), []byte("secret of later"), []byte("base"), []byte("shared")
	u.PutBlob("attacker/x", base)
	u.PutBlob("attacker/x", shared)
	u.PutImage("library/other", "v1", shared)
	m := claim(t, u, "attacker/x", "v1", layerOf(secret), layerOf(later), layerOf(base), layerOf(shared))
	r := newMirrorRig(t, mirrored(u))
	r.must(r.x.fill(t.Context()))
	own := func(b []byte) {
		t.Helper()
		r.must(r.x.putLayer(t.Context(), "team/secret", cluster.Layer{Digest: digest.FromBytes(b), Size: int64(len(b))}))
	}
	own(secret)
	own(base)
	repo := u.Alias + "/attacker/x"
	r.wantMirrored(repo, "v1", m.Digest, false)
	_, err := r.get(u.Alias+"/library/other", "v1")
	r.must(err)
	own(later)
	u.Forget()
	if got := r.askMembers(t.Context(), repo, layerOf(base).Digest, layerOf(shared).Digest); !slices.Equal(got, []digest.Digest{layerOf(shared).Digest}) {
		t.Errorf("members %v", got)
	}
	r.wantMember(t.Context(), repo, layerOf(shared).Digest, nil)
	wantAsked(t, u, "[]")
	r.wantMember(t.Context(), repo, layerOf(secret).Digest, registry.ErrBlobUnknown)
	r.wantMember(t.Context(), repo, layerOf(later).Digest, registry.ErrBlobUnknown)
	wantAsked(t, u, "[stat:2]")
	r.old(0)
	u.Fail(script.Rule{Refuse: true})
	if _, err := r.x.getLayer(t.Context(), repo, layerOf(base).Digest); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("while the upstream is away: %v", err)
	}
	u.Heal()
	r.start("first.db") // an upstream that did not answer is left alone for a moment
	u.Forget()
	for range 3 {
		r.wantMember(t.Context(), repo, layerOf(base).Digest, nil)
	}
	wantAsked(t, u, "[stat:1]")
	r.start("first.db")
	u.Fail(script.Rule{Refuse: true})
	r.wantMember(t.Context(), repo, layerOf(base).Digest, nil) // it has been proved
}

// A manifest is a blob in the bucket, too, and its digest may be named as a layer's: nobody reads it by another
// repository, be it one of the cluster's own or of a registry that only some may read.
func TestClaimOfAManifestIsNoMembership(t *testing.T) {
	u, r := private(t, true)
	img := u.PutImage("secret/app", "v1", []byte("layer"))
	good := cluster.WithAuthorization(t.Context(), basic("u", "p"))
	_, err := r.x.GetManifest(good, u.Alias+"/secret/app", registry.Reference{Tag: "v1"}, registry.GetOptions{})
	r.must(err)
	own := r.put("v", "secret")
	claim(t, u, "open/evil", "v1", img.Manifest, v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: own, Size: 2})
	_, err = r.get(u.Alias+"/open/evil", "v1")
	r.must(err)
	for _, d := range []digest.Digest{own, img.Manifest.Digest} {
		r.wantMember(t.Context(), u.Alias+"/open/evil", d, registry.ErrBlobUnknown)
	}
}

// The size of a blob is what its registry says, from the first answer on, and not what a manifest claims.
func TestSizeIsTheRegistrys(t *testing.T) {
	u := script.New(t, script.Options{})
	base := []byte("base")
	u.PutBlob("app", base)
	wrong := layerOf(base)
	wrong.Size = 999
	claim(t, u, "app", "v1", wrong)
	r := newMirrorRig(t, mirrored(u))
	r.must(r.x.fill(t.Context()))
	r.must(r.x.putLayer(t.Context(), "team/secret", cluster.Layer{Digest: wrong.Digest, Size: int64(len(base))}))
	_, err := r.get(u.Alias+"/app", "v1")
	r.must(err)
	for range 2 {
		if l, err := r.x.getLayer(t.Context(), u.Alias+"/app", wrong.Digest); err != nil || l.Size != int64(len(base)) {
			t.Errorf("%+v, %v, want %d bytes", l, err, len(base))
		}
	}
}

// A registry that only a pattern takes in may be anybody's: it has to send what somebody else has privately, and is not
// believed that it has it.
func TestAnybodysRegistryHasToSendTheBlob(t *testing.T) {
	u := script.New(t, script.Options{})
	secret, base, free := []byte("secret"), []byte("base"), []byte("free")
	u.PutBlob("x", base)
	u.PutBlob("x", free)
	claim(t, u, "x", "v1", layerOf(secret), layerOf(base), layerOf(free))
	cfg := mirrored(u)
	cfg.Registries[0].Registry = "127.0.0.1:*"
	r := newMirrorRig(t, cfg)
	r.must(r.x.fill(t.Context()))
	for _, b := range [][]byte{secret, base} {
		r.must(r.x.putLayer(t.Context(), "team/secret", cluster.Layer{Digest: digest.FromBytes(b), Size: int64(len(b))}))
	}
	repo := u.Alias + "/x"
	_, err := r.get(repo, "v1")
	r.must(err)
	u.Forget()
	r.wantMember(t.Context(), repo, layerOf(free).Digest, nil)
	wantAsked(t, u, "[]")
	r.wantMember(t.Context(), repo, layerOf(base).Digest, nil)
	wantAsked(t, u, "[blob:1 stat:1]")
	u.Fail(script.Rule{Kind: "stat", Status: http.StatusOK})
	r.wantMember(t.Context(), repo, layerOf(secret).Digest, registry.ErrBlobUnknown)
	r.old(0)
	u.PutBlob("x", secret)
	u.Fail(script.Rule{Kind: "blob", Flip: true, FlipAt: 2})
	r.wantMember(t.Context(), repo, layerOf(secret).Digest, registry.ErrBlobUnknown)
}

// A registry that sends its blobs slowly keeps nobody from asking others, nor from proofs by others, however many of
// its repositories are asked for; who is one too many is told so soon. No more is read of a blob than it is said to
// have.
func TestSlowProofsHoldNobodyUp(t *testing.T) {
	slow, other := script.New(t, script.Options{}), script.New(t, script.Options{})
	base := []byte("base")
	cfg := mirrored(slow)
	cfg.Registries[0].Registry = "127.0.0.1:*"
	r := newMirrorRig(t, cfg)
	r.must(r.x.fill(t.Context()))
	r.must(r.x.putLayer(t.Context(), "team/secret", cluster.Layer{Digest: digest.FromBytes(base), Size: int64(len(base))}))
	const many = 60
	for i := range many {
		slow.PutBlob(fmt.Sprint("r", i), base)
	}
	other.PutBlob("x", base)
	img := other.PutImage("y", "v1", []byte("layer"))
	slow.Fail(script.Rule{Kind: "blob", HangBody: true, CutAt: 1})
	refused := make(chan error, many)
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for i := range many {
		wg.Go(func() { refused <- r.x.mirror.granted(ctx, fmt.Sprint(slow.Alias, "/r", i), digest.FromBytes(base)) })
	}
	for range many - 10 {
		select {
		case err := <-refused:
			if !errors.Is(err, registry.ErrUnavailable) {
				t.Errorf("one too many: %v", err)
			}
		case <-time.After(proofPatience / 2):
			t.Fatal("who is one too many waits")
		}
	}
	r.must(r.x.mirror.granted(t.Context(), other.Alias+"/x", digest.FromBytes(base)))
	r.wantMirrored(other.Alias+"/y", "v1", img.Manifest.Digest, false)
	long := []byte("long")
	other.PutBlob("x", long)
	r.must(r.x.putLayer(t.Context(), "team/secret", cluster.Layer{Digest: digest.FromBytes(long), Size: int64(len(long))}))
	other.Fail(script.Rule{Kind: "blob", Long: 100, HangBody: true, CutAt: 50})
	r.must(r.x.mirror.granted(t.Context(), other.Alias+"/x", digest.FromBytes(long)))
}

// What a manifest only claims is not written back, so that it does not become a name of the cluster.
func TestClaimIsNotWrittenBack(t *testing.T) {
	u := script.New(t, script.Options{})
	secret := []byte("secret")
	claim(t, u, "attacker/x", "v1", layerOf(secret))
	good := u.PutImage("app", "v1", []byte("layer"))
	cfg := mirrored(u)
	cfg.Registries[0].WriteBack = true
	r := newMirrorRig(t, cfg)
	r.must(r.x.fill(t.Context()))
	for _, repo := range []string{"attacker/x", "app"} {
		_, err := r.get(u.Alias+"/"+repo, "v1")
		r.must(err)
	}
	r.durable(true)
	r.must(r.x.mirror.writeBack(t.Context()))
	r.must(r.x.putLayer(t.Context(), "team/secret", cluster.Layer{Digest: digest.FromBytes(secret), Size: 6}))
	r.wantMember(t.Context(), u.Alias+"/attacker/x", digest.FromBytes(secret), registry.ErrBlobUnknown)
	r.wantMember(t.Context(), u.Alias+"/app", good.Layers[0].Digest, nil)
	if _, err := r.x.db.Layer(t.Context(), u.Alias+"/app", good.Layers[0].Digest); err != nil {
		t.Errorf("what the upstream has is written back: %v", err)
	}
}

// private is a registry whose secret/** is read as who asks, and everything else by everybody.
func private(t *testing.T, writeBack bool) (*script.Registry, *rig) {
	u := script.New(t, script.Options{Token: true, Anonymous: true, Private: []string{"secret"}, User: "u", Password: "p", TLS: true})
	cfg := mirrored(u)
	cfg.Registries[0].Modes = []cluster.RepositoryMode{{Repository: "secret/**", Mode: cluster.ModeCaller}}
	cfg.Registries[0].WriteBack = writeBack
	r := newMirrorRig(t, cfg)
	r.must(r.x.fill(t.Context()))
	return u, r
}

// Whoever asks for a private blob's membership, by its own repository or by one that only claims it, is asked for the
// grant.
func TestPrivateBlobsNeedAGrant(t *testing.T) {
	u, r := private(t, false)
	img := u.PutImage("secret/app", "v1", []byte("layer"))
	d, repo := img.Layers[0].Digest, u.Alias+"/secret/app"
	claim(t, u, "open/evil", "v1", img.Layers[0])
	good, bad := cluster.WithAuthorization(t.Context(), basic("u", "p")), cluster.WithAuthorization(t.Context(), basic("x", "y"))
	_, err := r.get(u.Alias+"/open/evil", "v1")
	r.must(err)
	_, err = r.x.GetManifest(good, repo, registry.Reference{Tag: "v1"}, registry.GetOptions{})
	r.must(err)
	r.wantMember(t.Context(), repo, d, registry.ErrUnauthorized)
	r.wantMember(bad, repo, d, registry.ErrUnauthorized)
	r.wantMember(good, repo, d, nil)
	r.wantMember(t.Context(), u.Alias+"/open/evil", d, registry.ErrBlobUnknown)
	r.wantMember(bad, u.Alias+"/open/evil", d, registry.ErrBlobUnknown)
}

// Many registries answer 404 to who may not see a repository: that opens nothing that the cluster keeps, neither a tag
// that was written back, nor a blob for a mount, nor a grant by an empty list.
func TestHiddenRepositoryStaysHidden(t *testing.T) {
	u, r := private(t, true)
	img := u.PutImage("secret/app", "v1", []byte("layer"))
	sig := u.PutReferrer("secret/app", img.Manifest, "application/x.sig", []byte("signature"))
	repo, tag := u.Alias+"/secret/app", registry.Reference{Tag: "v1"}
	good, bad := cluster.WithAuthorization(t.Context(), basic("u", "p")), cluster.WithAuthorization(t.Context(), basic("x", "y"))
	_, err := r.x.GetManifest(good, repo, tag, registry.GetOptions{})
	r.must(err)
	for _, d := range append(img.Layers, img.Config) {
		r.must(r.x.mirror.granted(good, repo, d.Digest))
	}
	r.durable(true)
	r.must(r.x.mirror.writeBack(t.Context()))
	if _, err := r.x.db.Tag(t.Context(), repo, "v1"); err != nil {
		t.Fatalf("it is not written back: %v", err)
	}
	u.Fail(script.Rule{Status: http.StatusNotFound, About: "secret/app"})
	if p, err := r.x.ListReferrers(bad, repo, img.Manifest.Digest, "", ""); err == nil {
		t.Errorf("a stranger lists referrers: %+v", p)
	}
	for _, ref := range []registry.Reference{tag, {Digest: img.Manifest.Digest}} {
		if m, err := r.x.GetManifest(bad, repo, ref, registry.GetOptions{}); err == nil {
			t.Errorf("a stranger reads %s: %s", ref, m.Bytes)
		}
	}
	for _, from := range []string{"", repo} {
		if _, err := r.x.mount(bad, "own/app", from, img.Layers[0].Digest); !errors.Is(err, registry.ErrBlobUnknown) {
			t.Errorf("a stranger mounts from %q: %v", from, err)
		}
	}
	u.Heal()
	if p, err := r.x.ListReferrers(good, repo, img.Manifest.Digest, "", ""); err != nil || len(p.Descriptors) != 1 || p.Descriptors[0].Digest != sig.Digest {
		t.Errorf("who may read it lists %+v, %v", p, err)
	}
	if _, err := r.x.mount(good, "own/app", repo, img.Layers[0].Digest); err != nil {
		t.Errorf("who may read it mounts: %v", err)
	}
}

// Nothing that is asked for makes what is mirrored grow beyond its capacity, were it made up.
func TestMirrorIsBounded(t *testing.T) {
	u := script.New(t, script.Options{})
	img := u.PutImage("app", "v1", []byte("layer"))
	r := newMirrorRig(t, mirrored(u))
	repo := u.Alias + "/app"
	r.wantMirrored(repo, "v1", img.Manifest.Digest, false)
	for i := range 20 {
		_, err := r.x.ListReferrers(t.Context(), repo, digest.FromString(fmt.Sprint(i)), "", "")
		r.must(err)
		u.PutBlob("app", fmt.Append(nil, "blob", i))
		r.must(r.x.mirror.granted(t.Context(), repo, digest.FromString(fmt.Sprint("blob", i))))
	}
	r.must(r.x.mirror.prune(t.Context(), 0))
	if n, err := r.x.db.MirroredBytes(t.Context()); err != nil || n != 0 {
		t.Errorf("%d bytes, %v", n, err)
	}
	for i := range 20 {
		if _, err := r.x.db.MirroredReferrers(t.Context(), repo, digest.FromString(fmt.Sprint(i))); err == nil {
			t.Errorf("the list of referrers of a made-up digest stays")
		}
	}
	many := make([]v1.Descriptor, maxReferences+1)
	for i := range many {
		many[i] = layerOf([]byte("x"))
	}
	claim(t, u, "big", "v1", many...)
	r.wantError(u.Alias+"/big", "v1", errNotMirrored)
}

// A list of referrers with more bytes than a manifest may have is not taken.
func TestReferrersAreBounded(t *testing.T) {
	u := script.New(t, script.Options{})
	img := u.PutImage("app", "v1", []byte("layer"))
	r := newMirrorRig(t, mirrored(u))
	for i := range 5 {
		u.PutReferrer("app", img.Manifest, strings.Repeat("x", registry.MaxManifest/5)+strconv.Itoa(i), []byte("signature"))
	}
	if p, err := r.x.ListReferrers(t.Context(), u.Alias+"/app", img.Manifest.Digest, "", ""); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("%d descriptors, %v", len(p.Descriptors), err)
	}
}

// Of those who list an upstream's tags at once one asks, and nobody within tag_ttl.
func TestTagsAreListedOnce(t *testing.T) {
	u := script.New(t, script.Options{})
	u.PutImage("app", "v1", []byte("layer"))
	r := newMirrorRig(t, mirrored(u))
	list := func(want ...string) {
		t.Helper()
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if l, err := r.x.ListTags(t.Context(), u.Alias+"/app", registry.Page{N: -1}); err != nil || !slices.Equal(l.Names, want) {
					t.Errorf("%v, %v, want %v", l.Names, err, want)
				}
			})
		}
		wg.Wait()
	}
	list("v1")
	u.PutImage("app", "v2", []byte("layer"))
	list("v1")
	wantAsked(t, u, "[tags:1]")
	r.old(2 * time.Hour)
	list("v1", "v2")
	wantAsked(t, u, "[tags:1]")
}

// Who lists tags gets the answer, however many others list at the same time and whatever is remembered of them.
func TestManyListTags(t *testing.T) {
	u := script.New(t, script.Options{})
	const many = 6 * maxTagLists
	u.Fail(script.Rule{Kind: "tags", Delay: 300 * time.Millisecond}) // so that all answers come together
	for i := range many {
		u.PutImage(fmt.Sprint("app", i), "v1", []byte("layer"))
	}
	cfg := mirrored(u)
	cfg.Registries[0].Concurrency = many
	r := newMirrorRig(t, cfg)
	var wg sync.WaitGroup
	for i := range many {
		wg.Go(func() {
			if l, err := r.x.ListTags(t.Context(), fmt.Sprint(u.Alias, "/app", i), registry.Page{N: -1}); err != nil || !slices.Equal(l.Names, []string{"v1"}) {
				t.Errorf("%d: %v, %v", i, l.Names, err)
			}
		})
	}
	wg.Wait()
}
