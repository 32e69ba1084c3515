package agent

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/ring"
	"kraken/proto/role"
)

// holding is a build-index that knows which repositories have which blobs, and which of them are a caller's.
type holding struct {
	*index
	blobs map[string]bool // repository@digest

	single atomic.Int64 // questions about one blob
}

func newHolding(t *testing.T, blobs ...string) *holding {
	t.Helper()
	h := &holding{index: newIndex(t), blobs: map[string]bool{}}
	for _, b := range blobs {
		h.blobs[b] = true
	}
	h.upstreams.Upstreams = append(h.upstreams.Upstreams, cluster.Upstream{Registry: "registry.corp", Modes: []cluster.RepositoryMode{{Repository: "**", Mode: cluster.ModeCaller}}})
	front := h.index.Server.Config.Handler
	h.index.Server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		repo, rest, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/_kraken/")
		kind, d, _ := strings.Cut(rest, "/")
		switch {
		case !ok || repo == "" || strings.HasPrefix(r.URL.Path, "/v2/_kraken/"):
			front.ServeHTTP(w, r)
		case strings.HasPrefix(repo, "registry.corp/") && r.Header.Get(cluster.AuthorizationHeader) == "":
			w.WriteHeader(http.StatusUnauthorized)
		case strings.HasPrefix(repo, "registry.corp/"):
			w.WriteHeader(http.StatusForbidden)
		case kind == "members":
			var asked, has cluster.Members
			_ = json.NewDecoder(r.Body).Decode(&asked)
			for _, d := range asked.Digests {
				if h.blobs[repo+"@"+d.String()] {
					has.Digests = append(has.Digests, d)
				}
			}
			_ = json.NewEncoder(w).Encode(has)
		case !h.blobs[repo+"@"+d]:
			h.single.Add(1)
			w.WriteHeader(http.StatusNotFound)
		case kind == "grant":
			h.single.Add(1)
			w.WriteHeader(http.StatusNoContent)
		default:
			fmt.Fprintf(w, `{"digest":%q,"size":1}`, d)
		}
	})
	return h
}

// A blob is served for an upstream's repository only where build-index says that the repository has it, whatever other
// repositories have; while build-index is away what it confirmed is.
func TestBlobsByUpstreamsNames(t *testing.T) {
	public, secret, unseen := []byte("a public layer"), []byte("team/secret's layer"), []byte("a public layer that was never read here")
	d, s, n := digest.FromBytes(public), digest.FromBytes(secret), digest.FromBytes(unseen)
	o := newSource(t, public, secret, unseen)
	o.allow(everything)
	x := newHolding(t, "docker.io/library/app@"+d.String(), "docker.io/library/app@"+n.String(), "team/secret@"+s.String())
	a := startMirror(t, x.index, o.URL)
	want := func(when string, status map[string]int) {
		t.Helper()
		for path, want := range status {
			for _, method := range []string{http.MethodHead, http.MethodGet} {
				if resp, body := ask(t, method, "http://"+a.Addr()+"/v2/"+path); resp.StatusCode != want {
					t.Errorf("%s: %s %s: %s %.60s, want %d", when, method, path, resp.Status, body, want)
				}
			}
		}
	}
	want("build-index answers", map[string]int{
		"docker.io/library/app/blobs/" + d.String(): 200, "library/app/blobs/" + s.String() + "?ns=docker.io": 404, "docker.io/library/x/blobs/" + d.String(): 404,
		"team/secret/blobs/" + s.String(): 200, "team/other/blobs/" + s.String(): 404, "registry.corp/team/app/blobs/" + s.String(): 401,
	})
	x.Close()
	want("build-index is away", map[string]int{
		"docker.io/library/app/blobs/" + d.String(): 200, "docker.io/library/app/blobs/" + s.String(): 503, "docker.io/library/app/blobs/" + n.String(): 503,
		"docker.io/library/app/manifests/" + s.String(): 503, "team/secret/blobs/" + s.String(): 200, "team/other/blobs/" + s.String(): 503,
	})
}

// The memberships of an upstream's image cost one question, which comes with its manifest.
func TestMembersComeWithTheManifest(t *testing.T) {
	layers := [][]byte{[]byte("one"), []byte("two"), []byte("three")}
	o := newSource(t, layers...)
	o.allow(everything)
	x := newHolding(t)
	image := []map[string]any{}
	for _, l := range layers {
		x.blobs["docker.io/library/app@"+digest.FromBytes(l).String()] = true
		image = append(image, map[string]any{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest.FromBytes(l), "size": len(l)})
	}
	raw, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": image})
	if err != nil {
		t.Fatal(err)
	}
	x.put("docker.io/library/app", string(raw))
	a := startMirror(t, x.index, o.URL)
	base := "http://" + a.Addr() + "/v2/docker.io/library/app/"
	for range 2 {
		paths := []string{"manifests/v1"}
		for _, l := range layers {
			paths = append(paths, "blobs/"+digest.FromBytes(l).String())
		}
		for _, path := range paths {
			if resp, body := ask(t, http.MethodGet, base+path); resp.StatusCode != http.StatusOK {
				t.Errorf("%s: %s %s", path, resp.Status, body)
			}
		}
	}
	if n := x.single.Load(); n != 0 {
		t.Errorf("%d questions about single blobs", n)
	}
}

// A build-index that hangs after it has given a manifest is waited for once, not again for each blob of it.
func TestMembersThatHangAreWaitedForOnce(t *testing.T) {
	layer := []byte("a layer")
	d := digest.FromBytes(layer)
	o := newSource(t, layer)
	o.allow(everything)
	h := newHolding(t)
	h.put("team/app", fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[{"mediaType":"x","digest":%q,"size":%d}]}`, d, len(layer)))
	front, hung := h.index.Server.Config.Handler, make(chan struct{})
	var asked atomic.Int32 // of what hangs
	h.index.Server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/_kraken/members") || strings.Contains(r.URL.Path, "/_kraken/layers") || strings.Contains(r.URL.Path, "/_kraken/grant") {
			asked.Add(1)
			select {
			case <-hung:
			case <-r.Context().Done():
			}
			return
		}
		front.ServeHTTP(w, r)
	})
	defer close(hung)
	a := startMirrorWith(t, Config{BuildIndexWait: config.Duration(4 * time.Second)}, h.index, o.URL)
	base := "http://" + a.Addr() + "/v2/team/app"
	if resp, body := as(t, "", base+"/manifests/v1"); resp.StatusCode != http.StatusOK {
		t.Fatalf("the manifest: %s %s", resp.Status, body)
	}
	since := a.indexHealth.silent.Load()
	if n := asked.Load(); n != 1 || since == 0 {
		t.Errorf("the members of the image were asked for %d times, and then build-index counts as silent: %t", n, since != 0)
	}
	_, _ = as(t, "", base+"/blobs/"+d.String())
	// The second question had the patience that TestSilentBuildIndexCostsOnce is about.
	if n := asked.Load(); n != 2 || a.indexHealth.silent.Load() <= since {
		t.Errorf("build-index was asked %d times, and counts as silent since the last: %t", n, a.indexHealth.silent.Load() > since)
	}
}

// Where rules or callers decide, neither a manifest nor another blob is served by digest while build-index is away,
// unless it has confirmed that the repository has it.
func TestManifestsWhileBuildIndexIsAway(t *testing.T) {
	secret, mine := manifestOf("secret/app's"), manifestOf("mine/app's")
	blob := []byte("a config with a password")
	o := newSource(t, []byte(secret), []byte(mine), blob)
	o.allow(everything)
	x := newIndex(t)
	x.put("secret/app", secret)
	x.put("mine/app", mine)
	rules := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(rules, []byte("rules:\n  - {repositories: [\"mine/**\"], subjects: [anonymous], allow: [pull]}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	a := startWith(t, Config{
		Config:  role.Config{Origins: []ring.Member{{ID: "o", URL: o.URL}}},
		Tracker: role.Endpoint{URL: "http://127.0.0.1:1"}, BuildIndex: role.Endpoint{URL: x.URL},
		Access: Access{Rules: rules, Modes: []AccessMode{{"**", "caller"}}, Realm: "http://p/token"},
	})
	want := func(when, repo, of string, status int) {
		t.Helper()
		if resp, body := ask(t, http.MethodGet, "http://"+a.Addr()+"/v2/"+repo+"/manifests/"+digest.FromString(of).String()); resp.StatusCode != status {
			t.Errorf("%s: %s, %s: %s %s, want %d", when, repo, of, resp.Status, body, status)
		}
	}
	want("build-index answers", "mine/app", mine, 200)
	want("build-index answers", "mine/app", secret, 404)
	x.CloseClientConnections()
	x.Close()
	want("build-index is away", "mine/app", mine, 200)
	want("build-index is away", "mine/app", secret, 503)
	want("build-index is away", "mine/app", string(blob), 503)
	want("build-index is away", "mine/other", mine, 503)
	want("build-index is away", "secret/app", secret, 401)
}

// Who shows credentials that nobody takes leaves nothing behind.
func TestRefusedCallersLeaveNothing(t *testing.T) {
	layer := []byte("a private layer")
	o := newSource(t, layer)
	o.allow(everything)
	x := newHolding(t)
	a := startMirror(t, x.index, o.URL)
	eventually(t, "what is mirrored is kept for the next start", func() bool { return len(a.store.Names()) > 0 })
	before := len(a.store.Names())
	junk := "Basic " + base64.StdEncoding.EncodeToString([]byte("evil:x"))
	for i := range 100 {
		resp, _ := as(t, junk, "http://"+a.Addr()+"/v2/team/app/blobs/"+digest.FromString(fmt.Sprint(i)).String()+"?ns=registry.corp")
		if resp.StatusCode != http.StatusForbidden {
			t.Fatal(resp.Status)
		}
	}
	if n := len(a.store.Names()) - before; n > 0 {
		t.Errorf("100 refused requests left %d files", n)
	}
}

// An agent that has lost what build-index said and starts while that is away does not know which repositories are a
// caller's, so it serves nothing that build-index has not confirmed, by no name, and says that another time is better.
// Of tags that it knows from before those of names of the cluster's own are served, which are no upstream's. As soon as
// build-index says that all is for all, all is, also when it is away again.
func TestWhatIsPrivateIsNotKnownYet(t *testing.T) {
	secret, raw := []byte("a private layer"), manifestOf("registry.corp's")
	d, m := digest.FromBytes(secret), digest.FromString(raw)
	o := newSource(t, secret, []byte(raw))
	o.allow(everything)
	x := newIndex(t)
	x.upstreams = cluster.Upstreams{}
	x.put("own/repo", raw)
	x.put("registry.corp/team/app", raw)
	x.Server.Config.Handler = away(x.Server.Config.Handler, &x.away)
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	cfg := Config{
		Config: role.Config{Origins: []ring.Member{{ID: "o", URL: o.URL}}}, Tracker: role.Endpoint{URL: "http://127.0.0.1:1"}, BuildIndex: role.Endpoint{URL: x.URL},
		Cache: Cache{Dir: t.TempDir()},
	}
	tags := []string{"own/repo/manifests/v1", "registry.corp/team/app/manifests/v1"}
	t.Run("before", func(t *testing.T) {
		t.Cleanup(http.DefaultClient.CloseIdleConnections)
		a := startWith(t, cfg)
		for _, path := range tags {
			if resp, body := ask(t, http.MethodGet, "http://"+a.Addr()+"/v2/"+path); resp.StatusCode != http.StatusOK {
				t.Errorf("%s: %s %q", path, resp.Status, body)
			}
		}
		eventually(t, "what build-index said is kept", func() bool { _, err := a.store.Name(upstreamsKey); return err == nil })
		if err := a.store.DeleteName(upstreamsKey); err != nil {
			t.Fatal(err)
		}
	})
	x.away.Store(true)
	a := startWith(t, cfg)
	base := "http://" + a.Addr() + "/v2/"
	if resp, body := ask(t, http.MethodGet, base+tags[0]); resp.StatusCode != http.StatusOK || resp.Header.Get("Warning") == "" {
		t.Errorf("%s: %s %q", tags[0], resp.Status, body)
	}
	paths := []string{
		"own/repo/blobs/" + d.String(), "registry.corp/team/app/blobs/" + d.String(), "own/repo/manifests/" + m.String(), "registry.corp/team/app/manifests/" + m.String(),
		"docker.io/library/app/blobs/" + d.String(), tags[1],
	}
	for _, path := range paths {
		for _, method := range []string{http.MethodHead, http.MethodGet} {
			if resp, body := ask(t, method, base+path); resp.StatusCode != http.StatusServiceUnavailable || body == string(secret) || body == raw {
				t.Errorf("%s %s: %s %q", method, path, resp.Status, body)
			}
		}
	}
	for _, ns := range []string{"registry.corp", "docker.io"} { // 404 sends a runtime on as well
		if resp, body := ask(t, http.MethodGet, base+"team/app/blobs/"+d.String()+"?ns="+ns); resp.StatusCode != http.StatusNotFound {
			t.Errorf("by ?ns=%s: %s %q", ns, resp.Status, body)
		}
	}
	x.away.Store(false)
	eventually(t, "build-index is asked again", func() bool { return a.namer.Known() })
	x.away.Store(true)
	if resp, body := ask(t, http.MethodGet, base+paths[0]); resp.StatusCode != http.StatusOK || body != string(secret) {
		t.Errorf("nothing is private: %s %q", resp.Status, body)
	}
}

// away is a handler that answers 503 while it is away.
func away(h http.Handler, is *atomic.Bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if is.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		h.ServeHTTP(w, r)
	})
}
