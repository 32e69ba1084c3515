package buildindex

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/buildindex/names"
	"kraken/origin/upstream"
	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/registry"
	script "kraken/test/upstream"
)

var loopback = []string{"127.0.0.0/8", "::1/128"}

// mirrored is a configuration that mirrors one registry, with times that don't end within a test.
func mirrored(u *script.Registry) upstream.Config {
	return upstream.Config{AllowAddresses: loopback, Registries: []upstream.RegistryConfig{{
		Registry: u.Host, Access: upstream.Access{CA: u.CAFile, PlainHTTP: u.CAFile == ""}, TagTTL: config.Duration(time.Hour), NegativeTTL: config.Duration(time.Hour),
	}}}
}

func newMirrorRig(t testing.TB, cfg upstream.Config) *rig {
	r := &rig{TB: t, dir: t.TempDir(), origins: []*fakeOrigin{newFakeOrigin(t), newFakeOrigin(t)}, upstreams: cfg}
	r.keyFile = filepath.Join(r.dir, "record.key")
	r.start("first.db")
	return r
}

// old makes all that is known of tags older than any TTL.
func (r *rig) old(by time.Duration) {
	mi := r.x.mirror
	mi.tags.mu.Lock()
	defer mi.tags.mu.Unlock()
	for k, i := range mi.tags.items {
		i.value.Checked = i.value.Checked.Add(-by)
		mi.tags.items[k] = i
	}
	mi.lists.mu.Lock()
	defer mi.lists.mu.Unlock()
	for k, i := range mi.lists.items {
		if i.until = i.until.Add(-by); time.Now().After(i.until) {
			delete(mi.lists.items, k)
		}
	}
	mi.refused.mu.Lock()
	defer mi.refused.mu.Unlock()
	clear(mi.refused.items)
}

func (r *rig) get(repo, ref string) (*registry.Manifest, error) {
	parsed, err := registry.ParseReference(ref)
	r.must(err)
	return r.x.GetManifest(r.Context(), repo, parsed, registry.GetOptions{})
}

func (r *rig) wantMirrored(repo, ref string, want digest.Digest, stale bool) {
	r.Helper()
	m, err := r.get(repo, ref)
	switch {
	case err != nil:
		r.Errorf("%s of %s: %v", ref, repo, err)
	case m.Digest != want || digest.FromBytes(m.Bytes) != want || (m.Warning != "") != stale:
		r.Errorf("%s of %s: %s, want %s; warning %q", ref, repo, m.Digest, want, m.Warning)
	}
}

func (r *rig) wantError(repo, ref string, want error) {
	r.Helper()
	if m, err := r.get(repo, ref); !errors.Is(err, want) || errors.Is(err, registry.ErrTooManyRequests) {
		r.Errorf("%s of %s: %+v, %v, want %v", ref, repo, m, err, want)
	}
}

// asked is how many requests of each kind came since it was asked last.
func asked(u *script.Registry) string {
	count := map[string]int{}
	for _, q := range u.Requests() {
		count[q.Kind]++
	}
	u.Forget()
	return strings.TrimPrefix(fmt.Sprint(count), "map")
}

func wantAsked(t *testing.T, u *script.Registry, want string) {
	t.Helper()
	if got := asked(u); got != want {
		t.Errorf("the upstream was asked %s, want %s", got, want)
	}
}

// Any number of askers cost an upstream one GET of a manifest, and then one HEAD in tag_ttl; a digest nothing; also
// after a restart.
func TestUpstreamIsAskedOnce(t *testing.T) {
	u := script.New(t, script.Options{})
	img := u.PutImage("library/app", "v1", []byte("layer"))
	r := newMirrorRig(t, mirrored(u))
	repo := u.Alias + "/library/app"
	all := func() {
		t.Helper()
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { r.wantMirrored(repo, "v1", img.Manifest.Digest, false) })
			wg.Go(func() { r.wantMirrored(repo, img.Manifest.Digest.String(), img.Manifest.Digest, false) })
		}
		wg.Wait()
	}
	r.wantMirrored(repo, "v1", img.Manifest.Digest, false)
	wantAsked(t, u, "[manifest:1]")
	all()
	wantAsked(t, u, "[]")
	r.old(2 * time.Hour)
	all()
	wantAsked(t, u, "[head:1]")
	r.start("first.db")
	all()
	if got := asked(u); got != "[]" && got != "[head:1]" {
		t.Errorf("after a restart %s", got)
	}
	moved := u.PutImage("library/app", "v1", []byte("other layer"))
	r.old(2 * time.Hour)
	r.wantMirrored(repo, "v1", moved.Manifest.Digest, false)
	wantAsked(t, u, "[head:1 manifest:1]")
	for _, d := range append(moved.Layers, moved.Config) {
		if l, err := r.x.getLayer(t.Context(), repo, d.Digest); err != nil || l.Size != d.Size {
			t.Errorf("member %s: %+v, %v", d.Digest, l, err)
		}
	}
	if _, err := r.x.mount(t.Context(), "own/app", repo, moved.Config.Digest); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("a blob that may be nowhere is mounted: %v", err)
	}
}

// Who was about to ask when the answer came asks nobody.
func TestAnsweredMeanwhile(t *testing.T) {
	u := script.New(t, script.Options{})
	img := u.PutImage("app", "v1", []byte("layer"))
	r := newMirrorRig(t, mirrored(u))
	mi := r.x.mirror
	q, err := mi.about(t.Context(), u.Alias+"/app")
	r.must(err)
	for range 3 {
		r.must(mi.askTag(t.Context(), q, "v1"))
		r.must(mi.askDigest(t.Context(), q, img.Manifest.Digest))
		r.must(mi.askReferrers(t.Context(), q, img.Manifest.Digest))
	}
	wantAsked(t, u, "[manifest:1 referrers:1]")
}

// Of an index comes what is asked for.
func TestIndexBringsWhatIsAsked(t *testing.T) {
	u := script.New(t, script.Options{})
	amd, arm := u.PutImage("app", "", []byte("amd64")), u.PutImage("app", "", []byte("arm64"))
	index := u.PutIndex("app", "v1", amd.Manifest, arm.Manifest)
	r := newMirrorRig(t, mirrored(u))
	r.wantMirrored(u.Alias+"/app", "v1", index.Digest, false)
	r.wantMirrored(u.Alias+"/app", arm.Manifest.Digest.String(), arm.Manifest.Digest, false)
	wantAsked(t, u, "[manifest:2]")
	if _, err := r.x.getLayer(t.Context(), u.Alias+"/app", amd.Layers[0].Digest); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("a member that nothing that was read refers to: %v", err)
	}
}

// While an upstream is down, slow, or refuses, what it said last is served with a warning; never longer than stale_for,
// and what is not known is 503.
func TestLastKnownAnswer(t *testing.T) {
	for name, rule := range map[string]script.Rule{
		"down": {Refuse: true}, "hangs": {Hang: true}, "busy": {Status: http.StatusTooManyRequests, RetryAfter: 60}, "broken": {Status: http.StatusInternalServerError},
		"unavailable": {Status: http.StatusServiceUnavailable}, "lies": {Kind: "head", Digest: digest.FromString("x").String()},
	} {
		t.Run(name, func(t *testing.T) {
			u := script.New(t, script.Options{})
			img := u.PutImage("app", "v1", []byte("layer"))
			cfg := mirrored(u)
			cfg.Registries[0].Patience = config.Duration(200 * time.Millisecond)
			cfg.Registries[0].StaleFor = config.Duration(24 * time.Hour)
			r := newMirrorRig(t, cfg)
			repo := u.Alias + "/app"
			r.wantMirrored(repo, "v1", img.Manifest.Digest, false)
			u.Fail(rule)
			r.wantMirrored(repo, "v1", img.Manifest.Digest, false) // within tag_ttl
			r.old(2 * time.Hour)
			for range 3 {
				began := time.Now()
				r.wantMirrored(repo, "v1", img.Manifest.Digest, true)
				if took := time.Since(began); took > 3*time.Second {
					t.Errorf("it took %s", took)
				}
			}
			if name == "hangs" || name == "lies" {
				return // an unknown name is waited for, or true
			}
			r.wantError(repo, "v2", registry.ErrUnavailable)
			r.wantError(repo, "sha256-"+img.Manifest.Digest.Encoded()+".sig", registry.ErrUnavailable)
			r.old(48 * time.Hour)
			r.wantError(repo, "v1", registry.ErrUnavailable)
			r.wantMirrored(repo, img.Manifest.Digest.String(), img.Manifest.Digest, false)
		})
	}
}

// What an upstream says is not there, or not given, is so for negative_ttl, without asking again.
func TestRefusalsAreKept(t *testing.T) {
	u := script.New(t, script.Options{Token: true, Anonymous: true, Private: []string{"secret"}})
	img := u.PutImage("app", "v1", []byte("layer"))
	u.PutImage("secret", "v1", []byte("layer"))
	r := newMirrorRig(t, mirrored(u))
	for range 5 {
		r.wantError(u.Alias+"/app", "v9", registry.ErrManifestUnknown)
		r.wantError(u.Alias+"/app", digest.FromString("x").String(), registry.ErrManifestUnknown)
		r.wantError(u.Alias+"/secret", "v1", registry.ErrDenied)
	}
	for _, kind := range []string{"v9", digest.FromString("x").String()} {
		if n := u.Count("manifest", kind); n > 2 { // one of them for the challenge
			t.Errorf("%s: %d requests", kind, n)
		}
	}
	if n := u.Count("manifest", "secret"); n > 2 {
		t.Errorf("secret: %d requests", n)
	}
	r.wantMirrored(u.Alias+"/app", "v1", img.Manifest.Digest, false)
	u.DeleteTag("app", "v1")
	r.old(2 * time.Hour)
	r.wantError(u.Alias+"/app", "v1", registry.ErrManifestUnknown)
	u.Fail(script.Rule{Status: http.StatusServiceUnavailable})
	r.old(0)
	r.wantError(u.Alias+"/app", "v1", registry.ErrUnavailable) // it was deleted: that is no last known answer
}

// A manifest of another digest than was asked for is refused.
func TestWrongManifestIsRefused(t *testing.T) {
	u := script.New(t, script.Options{})
	img := u.PutImage("app", "v1", []byte("layer"))
	r := newMirrorRig(t, mirrored(u))
	u.Fail(script.Rule{Kind: "manifest", Flip: true, FlipAt: 30})
	r.wantError(u.Alias+"/app", "v1", registry.ErrUnavailable)
	r.wantError(u.Alias+"/app", img.Manifest.Digest.String(), registry.ErrUnavailable)
}

func TestWhatIsNotMirrored(t *testing.T) {
	u := script.New(t, script.Options{})
	r := newMirrorRig(t, mirrored(u))
	r.wantError("docker.io/library/nginx", "latest", registry.ErrNameUnknown)
	none := newMirrorRig(t, upstream.Config{})
	none.must(none.x.fill(t.Context()))
	none.wantError("team.a/app", "v1", registry.ErrManifestUnknown)
	none.policy = []Policy{{Match: ".*", References: "lax"}}
	none.start("second.db")
	if _, err := none.push("team.a/app", registry.Reference{Tag: "v1"}, raw("", "a/a"), registry.PutOptions{}); err != nil {
		t.Errorf("without upstreams all names are the cluster's own: %v", err)
	}
}

// A push to a registry's name is refused, whatever way it takes, unless it may be imported.
func TestPushesToUpstreamNames(t *testing.T) {
	u := script.New(t, script.Options{})
	r := newMirrorRig(t, mirrored(u))
	r.policy = []Policy{{Match: ".*", References: "lax"}}
	r.start("first.db")
	d := digest.FromString("x")
	try := func(repo string) map[string]error {
		_, put := r.push(repo, registry.Reference{Tag: "v1"}, raw("", "a/a"), registry.PutOptions{})
		_, mount := r.x.mount(t.Context(), repo, "", d)
		return map[string]error{
			"put": put, "mount": mount, "layer": r.x.putLayer(t.Context(), repo, cluster.Layer{Digest: d, Size: 1}), "delete layer": r.x.deleteLayer(t.Context(), repo, d),
			"delete": r.x.DeleteManifest(t.Context(), repo, registry.Reference{Tag: "v1"}),
		}
	}
	for _, repo := range []string{u.Alias + "/app", "docker.io/library/nginx", "localhost_5000/x"} {
		for what, err := range try(repo) {
			if !errors.Is(err, registry.ErrUnsupported) {
				t.Errorf("%s to %s: %v", what, repo, err)
			}
		}
	}
	r.upstreams.Registries[0].Import = true
	r.start("first.db")
	for what, err := range try(u.Alias + "/app") {
		if errors.Is(err, registry.ErrUnsupported) {
			t.Errorf("%s, import: %v", what, err)
		}
	}
}

// What was imported is served until the upstream says something else, and offline.
func TestImport(t *testing.T) {
	u := script.New(t, script.Options{})
	cfg := mirrored(u)
	cfg.Registries[0].Import = true
	r := newMirrorRig(t, cfg)
	r.policy = []Policy{{Match: ".*", References: "lax"}}
	r.start("first.db")
	r.must(r.x.fill(t.Context()))
	repo := u.Alias + "/app"
	b := raw("", "a/a")
	if _, err := r.push(repo, registry.Reference{Tag: "v1"}, b, registry.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	r.wantMirrored(repo, "v1", digest.FromBytes(b), false)
	r.upstreams.Offline = true
	r.start("first.db")
	r.must(r.x.fill(t.Context()))
	u.Forget()
	r.wantMirrored(repo, "v1", digest.FromBytes(b), false)
	r.wantError(repo, "v2", registry.ErrUnavailable)
	wantAsked(t, u, "[]")
	if tags, err := r.x.ListTags(t.Context(), repo, registry.Page{N: -1}); err != nil || !slices.Equal(tags.Names, []string{"v1"}) {
		t.Errorf("%+v, %v", tags, err)
	}
}

// A tag that somebody pushed before its registry was mirrored is none of the registry's.
func TestOlderPushIsNotTheUpstreams(t *testing.T) {
	u := script.New(t, script.Options{})
	img := u.PutImage("app", "v1", []byte("layer"))
	r := newMirrorRig(t, upstream.Config{})
	r.policy = []Policy{{Match: ".*", References: "lax"}}
	r.start("first.db")
	repo := u.Alias + "/app"
	if _, err := r.push(repo, registry.Reference{Tag: "v1"}, raw("", "evil/evil"), registry.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	r.upstreams = mirrored(u)
	r.start("first.db")
	r.must(r.x.fill(t.Context()))
	r.wantMirrored(repo, "v1", img.Manifest.Digest, false)
	u.Fail(script.Rule{Refuse: true})
	r.old(2 * time.Hour)
	r.wantMirrored(repo, "v1", img.Manifest.Digest, true)
	r.wantError(repo, "v2", registry.ErrUnavailable)
}

// Referrers are the upstream's, from the API or the tag schema; what was seen is there offline, and what was not is
// 503.
func TestReferrersOfUpstreams(t *testing.T) {
	for _, old := range []bool{false, true} {
		t.Run(fmt.Sprint("without the API: ", old), func(t *testing.T) {
			u := script.New(t, script.Options{NoReferrers: old})
			img := u.PutImage("app", "v1", []byte("layer"))
			bare := u.PutImage("app", "v2", []byte("bare"))
			sig := u.PutReferrer("app", img.Manifest, "application/x.sig", []byte("signature"))
			if old {
				u.PutIndex("app", fallbackTag(img.Manifest.Digest), sig)
			}
			cosign := "sha256-" + img.Manifest.Digest.Encoded() + ".sig"
			signed := u.PutImage("app", cosign, []byte("signature"))
			r := newMirrorRig(t, mirrored(u))
			repo := u.Alias + "/app"
			list := func(d digest.Digest, artifactType string) (got []v1.Descriptor, err error) {
				p, err := r.x.ListReferrers(t.Context(), repo, d, artifactType, "")
				return p.Descriptors, err
			}
			check := func() {
				t.Helper()
				if got, err := list(img.Manifest.Digest, ""); err != nil || len(got) != 1 || got[0].Digest != sig.Digest {
					t.Errorf("%+v, %v", got, err)
				}
				if got, err := list(img.Manifest.Digest, "other/type"); err != nil || len(got) != 0 {
					t.Errorf("of another type: %+v, %v", got, err)
				}
				if got, err := list(bare.Manifest.Digest, ""); err != nil || len(got) != 0 {
					t.Errorf("of one without: %+v, %v", got, err)
				}
				r.wantMirrored(repo, sig.Digest.String(), sig.Digest, false)
				r.wantMirrored(repo, cosign, signed.Manifest.Digest, false)
			}
			check()
			u.Forget()
			check()
			wantAsked(t, u, "[]")
			r.wantError(repo, "sha256-"+bare.Manifest.Digest.Encoded()+".sig", registry.ErrManifestUnknown)
			r.upstreams.Offline = true
			r.start("first.db")
			u.Forget()
			check()
			if _, err := list(digest.FromString("unseen"), ""); !errors.Is(err, registry.ErrUnavailable) {
				t.Errorf("not seen: %v", err)
			}
			r.wantError(repo, "sha256-"+digest.FromString("unseen").Encoded()+".sig", registry.ErrUnavailable)
			wantAsked(t, u, "[]")
		})
	}
}

// Tags are listed as the upstream has them; while it can't be asked, those that are known.
func TestTagsOfUpstreams(t *testing.T) {
	u := script.New(t, script.Options{})
	img := u.PutImage("app", "v1", []byte("layer"))
	u.PutImage("app", "v2", []byte("layer"))
	r := newMirrorRig(t, mirrored(u))
	repo := u.Alias + "/app"
	list := func(repo string, want []string, kind error) {
		t.Helper()
		l, err := r.x.ListTags(t.Context(), repo, registry.Page{N: -1})
		if !errors.Is(err, kind) || !slices.Equal(l.Names, want) {
			t.Errorf("%v, %v", l.Names, err)
		}
	}
	list(repo, []string{"v1", "v2"}, nil)
	list(u.Alias+"/none", nil, registry.ErrNameUnknown)
	r.wantMirrored(repo, "v1", img.Manifest.Digest, false)
	u.Fail(script.Rule{Refuse: true})
	r.old(2 * time.Hour)
	list(repo, []string{"v1"}, nil)
}

func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// In mode caller nothing that is cached is given to who was not let in by the upstream; who was is asked about once.
func TestCallerMode(t *testing.T) {
	for _, o := range []script.Options{{Basic: true}, {Token: true, Anonymous: true, Private: []string{"secret"}}} {
		t.Run(fmt.Sprintf("basic: %v", o.Basic), func(t *testing.T) {
			o.User, o.Password, o.TLS = "u", "p", true
			u := script.New(t, o)
			img := u.PutImage("secret/app", "v1", []byte("layer"))
			other := u.PutImage("secret/other", "v1", []byte("another layer"))
			cfg := mirrored(u)
			cfg.Registries[0].Modes = []cluster.RepositoryMode{{Repository: "secret/**", Mode: cluster.ModeCaller}}
			r := newMirrorRig(t, cfg)
			repo := u.Alias + "/secret/app"
			as := func(user, password string) context.Context {
				return cluster.WithAuthorization(t.Context(), basic(user, password))
			}
			get := func(ctx context.Context, ref string) error {
				parsed, err := registry.ParseReference(ref)
				r.must(err)
				_, err = r.x.GetManifest(ctx, repo, parsed, registry.GetOptions{})
				return err
			}
			denied := func(when string) {
				t.Helper()
				for who, ctx := range map[string]context.Context{"nobody": t.Context(), "a stranger": as("u", "wrong"), "another": as("x", "p")} {
					for _, ref := range []string{"v1", img.Manifest.Digest.String()} {
						if err := get(ctx, ref); !errors.Is(err, registry.ErrUnauthorized) {
							t.Errorf("%s, %s, %s: %v", when, who, ref, err)
						}
					}
					if err := r.x.mirror.granted(ctx, repo, img.Config.Digest); !errors.Is(err, registry.ErrUnauthorized) {
						t.Errorf("%s, %s, a blob: %v", when, who, err)
					}
					if _, err := r.x.ListReferrers(ctx, repo, img.Manifest.Digest, "", ""); !errors.Is(err, registry.ErrUnauthorized) {
						t.Errorf("%s, %s, referrers: %v", when, who, err)
					}
				}
			}
			denied("before")
			u.Forget()
			for range 10 {
				for _, ref := range []string{"v1", img.Manifest.Digest.String()} {
					if err := get(as("u", "p"), ref); err != nil {
						t.Errorf("%s: %v", ref, err)
					}
				}
				if err := r.x.mirror.granted(as("u", "p"), repo, img.Config.Digest); err != nil {
					t.Error(err)
				}
			}
			if n := u.Count("manifest", "") + u.Count("head", ""); n > 2 {
				t.Errorf("%d requests: %+v", n, u.Requests())
			}
			if err := r.x.mirror.granted(as("u", "p"), repo, other.Config.Digest); !errors.Is(err, registry.ErrBlobUnknown) {
				t.Errorf("a blob of another repository: %v", err)
			}
			denied("after")
			r.start("first.db") // grants are memory, what was read is not
			denied("restarted")
			u.Fail(script.Rule{Refuse: true})
			r.old(0)
			if err := get(as("u", "p"), "v1"); !errors.Is(err, registry.ErrUnavailable) {
				t.Errorf("nobody can say: %v", err)
			}
		})
	}
}

// The routes of the extension, over HTTP, as other roles ask.
func TestMirrorRoutes(t *testing.T) {
	u := script.New(t, script.Options{Basic: true, User: "u", Password: "p", TLS: true})
	img := u.PutImage("secret/app", "v1", []byte("layer"))
	cfg := mirrored(u)
	cfg.Deny = []string{"*.evil.example"}
	cfg.Registries[0].Modes = []cluster.RepositoryMode{{Repository: "**", Mode: cluster.ModeCaller}}
	r := newMirrorRig(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.x.Run(ctx) }()
	defer func() {
		cancel()
		r.must(<-done)
		r.x = nil
	}()
	c, err := cluster.NewIndexClient(r.x.URL(), http.DefaultClient)
	r.must(err)
	defer http.DefaultClient.CloseIdleConnections()
	ups, err := c.Upstreams(ctx)
	if err != nil || !ups.Mirrors(u.Host) || ups.Mirrors("a.evil.example") || ups.Upstreams[0].Mode("x") != cluster.ModeCaller {
		t.Errorf("%+v, %v", ups, err)
	}
	repo := u.Alias + "/secret/app"
	ref := registry.Reference{Tag: "v1"}
	good := cluster.WithAuthorization(ctx, basic("u", "p"))
	if _, err := c.GetManifest(ctx, repo, ref, registry.GetOptions{}); !errors.Is(err, registry.ErrUnauthorized) {
		t.Error(err)
	}
	if m, err := c.GetManifest(good, repo, ref, registry.GetOptions{}); err != nil || m.Digest != img.Manifest.Digest {
		t.Error(err)
	}
	if err := c.Granted(good, repo, img.Config.Digest); err != nil {
		t.Error(err)
	}
	if err := c.Granted(ctx, repo, img.Config.Digest); !errors.Is(err, registry.ErrUnauthorized) {
		t.Error(err)
	}
	if _, err := c.PutManifest(good, repo, ref, v1.MediaTypeImageManifest, raw("", "a/a"), registry.PutOptions{}); !errors.Is(err, registry.ErrUnsupported) {
		t.Error(err)
	}
}

// A real registry, with tokens and TLS, is asked as seldom, and about callers as the scripted one.
func TestDebianUpstream(t *testing.T) {
	d := script.NewDebian(t, script.DebianOptions{Token: true, User: "u", Password: "p"})
	img := d.PutImage(t, "team/app", "v1", []byte("layer"))
	private := d.PutImage(t, "private/app", "v1", []byte("private layer"))
	access := upstream.Access{CA: d.CAFile, Credentials: upstream.Credentials{Username: "u", Password: config.NewSecret("p")}}
	r := newMirrorRig(t, upstream.Config{AllowAddresses: loopback, Registries: []upstream.RegistryConfig{{
		Registry: d.Host, Access: access, TagTTL: config.Duration(time.Hour), Modes: []cluster.RepositoryMode{{Repository: "private/**", Mode: cluster.ModeCaller}, {Repository: "**", Mode: cluster.ModeNode}},
	}}})
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() { r.wantMirrored(d.Alias+"/team/app", "v1", img.Manifest.Digest, false) })
	}
	wg.Wait()
	// one for the challenge
	if heads, gets := d.Count(t, "HEAD /v2/team/"), d.Count(t, "GET /v2/team/app/manifests/"); heads > 0 || gets > 2 || d.Tokens() != 1 {
		t.Errorf("%d HEAD, %d GET, %d tokens", heads, gets, d.Tokens())
	}
	ref := registry.Reference{Tag: "v1"}
	for value, want := range map[string]error{"": registry.ErrUnauthorized, basic("u", "wrong"): registry.ErrUnauthorized, basic("u", "p"): nil} {
		m, err := r.x.GetManifest(cluster.WithAuthorization(t.Context(), value), d.Alias+"/private/app", ref, registry.GetOptions{})
		if !errors.Is(err, want) || want == nil && (err != nil || m.Digest != private.Manifest.Digest) {
			t.Errorf("%q: %+v, %v", value, m, err)
		}
	}
}

// With write_back names are the cluster's own when the bucket has their blobs: an image, its tag, the index that lists
// it although another child was never asked for. They outlive the loss of the database, and without write_back nothing
// is in the bucket.
func TestNamesAreWrittenBack(t *testing.T) {
	for _, writes := range []bool{true, false} {
		t.Run(fmt.Sprint(writes), func(t *testing.T) {
			u := script.New(t, script.Options{})
			amd, arm := u.PutImage("app", "", []byte("amd64")), u.PutImage("app", "", []byte("arm64"))
			index := u.PutIndex("app", "v1", amd.Manifest, arm.Manifest)
			cfg := mirrored(u)
			cfg.Registries[0].WriteBack = writes
			r := newMirrorRig(t, cfg)
			r.must(r.x.fill(t.Context()))
			repo := u.Alias + "/app"
			r.wantMirrored(repo, "v1", index.Digest, false)
			r.wantMirrored(repo, amd.Manifest.Digest.String(), amd.Manifest.Digest, false)
			sweep := func(durable bool) int {
				t.Helper()
				for _, o := range r.origins {
					o.mu.Lock()
					o.durable = durable
					o.mu.Unlock()
				}
				r.must(r.x.mirror.writeBack(t.Context()))
				s, err := r.x.db.State(t.Context())
				r.must(err)
				return s.OutboxRows
			}
			if n := sweep(false); n != 0 {
				t.Errorf("%d changes although the bucket lacks the blobs", n)
			}
			if n := sweep(true); (n > 0) != writes {
				t.Errorf("%d changes", n)
			}
			before := sweep(true)
			if n := sweep(true); n != before {
				t.Errorf("again: %d changes, then %d", before, n)
			}
			r.publish()
			r.upstreams.Offline = true
			r.start("second.db")
			r.must(r.x.fill(t.Context()))
			if !writes {
				r.wantError(repo, "v1", registry.ErrUnavailable)
				return
			}
			r.wantMirrored(repo, "v1", index.Digest, false)
			r.wantMirrored(repo, amd.Manifest.Digest.String(), amd.Manifest.Digest, false)
			r.wantError(repo, arm.Manifest.Digest.String(), registry.ErrUnavailable)
			if l, err := r.x.getLayer(t.Context(), repo, amd.Layers[0].Digest); err != nil || l.Size != amd.Layers[0].Size {
				t.Errorf("%+v, %v", l, err)
			}
		})
	}
}

// A tag that moves is written back again, and what was imported later stays.
func TestTagIsWrittenBackAgain(t *testing.T) {
	u := script.New(t, script.Options{})
	one := u.PutImage("app", "v1", []byte("one"))
	cfg := mirrored(u)
	cfg.Registries[0].WriteBack, cfg.Registries[0].Import = true, true
	r := newMirrorRig(t, cfg)
	r.policy = []Policy{{Match: ".*", References: "lax"}}
	r.start("first.db")
	r.must(r.x.fill(t.Context()))
	for _, o := range r.origins {
		o.mu.Lock()
		o.durable = true
		o.mu.Unlock()
	}
	repo := u.Alias + "/app"
	own := func(want digest.Digest) {
		t.Helper()
		r.must(r.x.mirror.writeBack(t.Context()))
		if v, err := r.x.db.Tag(t.Context(), repo, "v1"); err != nil || v.Digest != want {
			t.Errorf("%+v, %v, want %s", v, err, want)
		}
	}
	r.wantMirrored(repo, "v1", one.Manifest.Digest, false)
	own(one.Manifest.Digest)
	two := u.PutImage("app", "v1", []byte("two"))
	time.Sleep(2 * time.Millisecond) // answers have milliseconds
	r.old(2 * time.Hour)
	mi := r.x.mirror
	q, err := mi.about(t.Context(), repo)
	r.must(err)
	impatient := *q.up
	impatient.TagTTL = 1
	q.up = &impatient
	r.must(mi.askTag(t.Context(), q, "v1"))
	own(two.Manifest.Digest)
	pushed := raw("", "a/a")
	if _, err := r.push(repo, registry.Reference{Tag: "v1"}, pushed, registry.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	own(digest.FromBytes(pushed))
	r.wantMirrored(repo, "v1", digest.FromBytes(pushed), false)
}

// A use that SQL could not be told of, because the write failed or too many others waited, is told of later: what is
// read each day is not pruned as if nobody did.
func TestUsesAreToldOf(t *testing.T) {
	u := script.New(t, script.Options{})
	old, fresh := u.PutImage("old", "v1", []byte("one")), u.PutImage("fresh", "v1", []byte("two"))
	r := newMirrorRig(t, mirrored(u))
	r.wantMirrored(u.Alias+"/old", "v1", old.Manifest.Digest, false)
	r.wantMirrored(u.Alias+"/fresh", "v1", fresh.Manifest.Digest, false)
	mi := r.x.mirror
	r.must(mi.prune(t.Context(), 1<<30))
	mi.used.clear()                  // as a day later
	time.Sleep(2 * time.Millisecond) // uses have milliseconds
	r.wantMirrored(u.Alias+"/fresh", fresh.Manifest.Digest.String(), fresh.Manifest.Digest, false)
	r.must(mi.prune(t.Context(), 1<<30))
	time.Sleep(2 * time.Millisecond)
	for i := range maxUnsaved {
		mi.use("made/up", digest.FromString(fmt.Sprint(i)))
	}
	use := func() { r.wantMirrored(u.Alias+"/old", old.Manifest.Digest.String(), old.Manifest.Digest, false) }
	use()
	failing, cancel := context.WithCancel(t.Context())
	cancel()
	if err := mi.prune(failing, 1<<30); err == nil {
		t.Fatal("the write does not fail")
	}
	r.must(mi.prune(t.Context(), 1<<30)) // of what waited before
	use()
	if err := mi.prune(failing, 1<<30); err == nil {
		t.Fatal("the write does not fail")
	}
	r.must(mi.prune(t.Context(), 1<<30))
	r.must(r.x.db.Update(t.Context(), func(tx names.Tx) error {
		_, err := tx.PruneMirrored(1)
		return err
	}))
	if _, err := r.x.db.MirroredManifest(t.Context(), u.Alias+"/old", old.Manifest.Digest); err != nil {
		t.Errorf("what was used last: %v", err)
	}
}

// However many tags can't be written back, those behind them are; also behind one that policy keeps where it is.
func TestTagsBehindOthersAreWrittenBack(t *testing.T) {
	u := script.New(t, script.Options{})
	first, img := u.PutImage("aaa", "fixed", []byte("one")), u.PutImage("app", "v1", []byte("layer"))
	cfg := mirrored(u)
	cfg.Registries[0].WriteBack = true
	r := newMirrorRig(t, cfg)
	r.policy = []Policy{{Match: ".*/aaa", ImmutableTags: "fixed"}}
	r.start("first.db")
	r.must(r.x.fill(t.Context()))
	r.durable(true)
	r.wantMirrored(u.Alias+"/aaa", "fixed", first.Manifest.Digest, false)
	r.must(r.x.mirror.writeBack(t.Context()))
	moved := u.PutImage("aaa", "fixed", []byte("two"))
	time.Sleep(2 * time.Millisecond) // answers have milliseconds
	r.must(r.x.db.Update(t.Context(), func(tx names.Tx) error {
		const foreign = "0.example/x" // no registry of this configuration's
		d := digest.FromString("x")
		err := tx.PutManifest(names.Manifest{Repository: foreign, Digest: d, MediaType: "x/y", Generation: 1, Bytes: []byte("x")})
		for i := range writeBackPage + 1 {
			err = errors.Join(err, tx.PutMirroredTag(foreign, fmt.Sprint("v", i), names.MirroredTag{Digest: d, Checked: time.Now()}))
		}
		return errors.Join(err, tx.DeleteMirroredTag(u.Alias+"/aaa", "fixed"))
	}))
	r.start("first.db")
	r.must(r.x.fill(t.Context()))
	_, err := r.get(u.Alias+"/aaa", moved.Manifest.Digest.String())
	r.must(err)
	r.must(r.x.db.Update(t.Context(), func(tx names.Tx) error {
		return tx.PutMirroredTag(u.Alias+"/aaa", "fixed", names.MirroredTag{Digest: moved.Manifest.Digest, Checked: time.Now()})
	}))
	r.wantMirrored(u.Alias+"/app", "v1", img.Manifest.Digest, false)
	r.must(r.x.mirror.writeBack(t.Context()))
	if v, err := r.x.db.Tag(t.Context(), u.Alias+"/app", "v1"); err != nil || v.Digest != img.Manifest.Digest {
		t.Errorf("behind the others: %+v, %v", v, err)
	}
	if v, err := r.x.db.Tag(t.Context(), u.Alias+"/aaa", "fixed"); err != nil || v.Digest != first.Manifest.Digest {
		t.Errorf("what policy keeps: %+v, %v", v, err)
	}
}

// Of what is mirrored the least recently used goes; a tag whose manifest went is asked for again.
func TestMirrorIsPruned(t *testing.T) {
	u := script.New(t, script.Options{})
	img := u.PutImage("app", "v1", []byte("layer"))
	r := newMirrorRig(t, mirrored(u))
	repo := u.Alias + "/app"
	r.wantMirrored(repo, "v1", img.Manifest.Digest, false)
	r.must(r.x.mirror.prune(t.Context(), img.Manifest.Size))
	r.wantMirrored(repo, "v1", img.Manifest.Digest, false)
	wantAsked(t, u, "[manifest:1]")
	r.must(r.x.mirror.prune(t.Context(), 0))
	if n, err := r.x.db.MirroredBytes(t.Context()); err != nil || n != 0 {
		t.Errorf("%d bytes, %v", n, err)
	}
	r.wantMirrored(repo, "v1", img.Manifest.Digest, false)
	wantAsked(t, u, "[manifest:1]")
}
