package agent

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
	"kraken/proto/config"
)

// granting is a build-index whose upstream gives registry.corp's repositories to one user.
type granting struct {
	*index
	basic string
	layer digest.Digest

	mu      sync.Mutex
	grants  int             // questions about blobs
	members map[string]bool // repositories of the cluster's own that have the layer
}

func newGranting(t *testing.T, layer []byte) *granting {
	t.Helper()
	g := &granting{index: newIndex(t), basic: base64.StdEncoding.EncodeToString([]byte("pod:secret")), layer: digest.FromBytes(layer), members: map[string]bool{}}
	g.upstreams.Upstreams = append(g.upstreams.Upstreams, cluster.Upstream{
		Registry: "registry.corp", Modes: []cluster.RepositoryMode{{Repository: "open/**", Mode: cluster.ModePublic}, {Repository: "**", Mode: cluster.ModeCaller}},
	})
	g.put("registry.corp/team/app", fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[{"mediaType":"x","digest":%q,"size":%d}]}`, g.layer, len(layer)))
	front := g.index.Server.Config.Handler
	g.index.Server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller := r.Header.Get(cluster.AuthorizationHeader) == "Basic "+g.basic
		repo, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/_kraken/")
		g.mu.Lock()
		defer g.mu.Unlock()
		switch {
		case strings.HasPrefix(rest, "layers/"):
			if !g.members[repo] {
				w.WriteHeader(http.StatusNotFound)
				return
			}
			_ = json.NewEncoder(w).Encode(cluster.Layer{Digest: g.layer, Size: int64(len(layer))})
		case strings.HasPrefix(r.URL.Path, "/v2/registry.corp/") && r.Header.Get(cluster.AuthorizationHeader) == "":
			w.WriteHeader(http.StatusUnauthorized)
		case strings.HasPrefix(r.URL.Path, "/v2/registry.corp/") && !caller:
			w.WriteHeader(http.StatusForbidden)
		case strings.HasPrefix(rest, "grant/"):
			g.grants++
			w.WriteHeader(http.StatusNoContent)
		default:
			front.ServeHTTP(w, r)
		}
	})
	return g
}

// as asks with a value of Authorization, empty for none.
func as(t *testing.T, authorization, url string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Error(err)
	}
	return resp, string(b)
}

// A private upstream's image is given to who shows credentials that the upstream takes, be it by Basic or by a token of
// the agent's realm, and to nobody else, cached or not, by whatever name, also while build-index is away.
func TestCallersSeeWhatTheUpstreamGivesThem(t *testing.T) {
	layer := []byte("a private layer")
	o := newSource(t, layer)
	o.allow(everything)
	g := newGranting(t, layer)
	a := startMirror(t, g.index, o.URL)
	base := "http://" + a.Addr()
	manifest, blob := base+"/v2/team/app/manifests/v1?ns=registry.corp", base+"/v2/team/app/blobs/"+g.layer.String()+"?ns=registry.corp"
	raw := g.manifests["registry.corp/team/app"]
	byDigest := base + "/v2/team/app/manifests/" + digest.FromString(raw).String() + "?ns=registry.corp"

	resp, _ := as(t, "", manifest)
	challenges := strings.Join(resp.Header.Values("WWW-Authenticate"), "\n")
	if resp.StatusCode != http.StatusUnauthorized || !strings.Contains(challenges, "Basic realm=") || !strings.Contains(challenges, `Bearer realm="`+base+`/token"`) {
		t.Fatalf("without credentials: %s, %s", resp.Status, challenges)
	}
	if resp, err := http.PostForm(base+"/token", url.Values{"grant_type": {"password"}, "username": {"pod"}, "password": {"secret"}, "scope": {"repository:team/app:pull"}}); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("the realm: %v %v", resp, err)
	} else {
		var token struct {
			AccessToken string `json:"access_token"`
		}
		if err := json.NewDecoder(resp.Body).Decode(&token); err != nil || strings.Contains(token.AccessToken, g.basic) {
			t.Fatalf("the realm: %v %+v", err, token)
		}
		resp.Body.Close()
		for _, u := range []string{manifest, byDigest, blob} {
			for _, authorization := range []string{"Bearer " + token.AccessToken, "Basic " + g.basic} {
				if resp, body := as(t, authorization, u); resp.StatusCode != http.StatusOK {
					t.Errorf("%.6s %s: %s %s", authorization, u, resp.Status, body)
				}
			}
		}
	}
	other := "Basic " + base64.StdEncoding.EncodeToString([]byte("pod:wrong"))
	for _, u := range []string{manifest, byDigest, blob} {
		for authorization, want := range map[string]int{"": 401, other: 403, "Bearer bm9uc2Vuc2U": 401, "Bearer " + strings.Repeat("A", 100): 401} {
			if resp, body := as(t, authorization, u); resp.StatusCode != want {
				t.Errorf("%s as %.20q: %s %s", u, authorization, resp.Status, body)
			}
		}
	}
	own := base + "/v2/some/repo/blobs/" + g.layer.String()
	if resp, _ := as(t, "", own); resp.StatusCode != http.StatusNotFound {
		t.Errorf("by a repository of the cluster's own that does not have it: %s", resp.Status)
	}
	g.mu.Lock()
	g.members["has/it"] = true
	g.mu.Unlock()
	if resp, body := as(t, "", base+"/v2/has/it/blobs/"+g.layer.String()); resp.StatusCode != http.StatusOK || body != string(layer) {
		t.Errorf("by a repository of the cluster's own that has it: %s", resp.Status)
	}
	g.Close()
	for authorization, want := range map[string]int{"": 401, other: 503, "Basic " + g.basic: 200} {
		if resp, body := as(t, authorization, manifest); resp.StatusCode != want {
			t.Errorf("while build-index is away, as %.20q: %s %s", authorization, resp.Status, body)
		}
	}
	if resp, _ := as(t, "", base+"/v2/some/repo/manifests/"+digest.FromString(raw).String()); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("a private manifest by another repository while build-index is away: %s", resp.Status)
	}
}

// What a caller was let read counts for that caller for a moment, however long manifests count.
func TestManifestsOfCallersCountForAMoment(t *testing.T) {
	g := newGranting(t, []byte("x"))
	a := startMirrorWith(t, Config{ManifestTTL: config.Duration(10 * time.Minute)}, g.index, "http://127.0.0.1:1")
	raw := g.manifests["registry.corp/team/app"]
	for _, ref := range []string{"v1", digest.FromString(raw).String()} {
		a.checked.DeleteAll()
		if resp, body := as(t, "Basic "+g.basic, "http://"+a.Addr()+"/v2/team/app/manifests/"+ref+"?ns=registry.corp"); resp.StatusCode != http.StatusOK {
			t.Fatalf("%s %s", resp.Status, body)
		}
		items := a.checked.Items()
		if len(items) == 0 {
			t.Fatalf("%s: nothing is kept", ref)
		}
		for key, item := range items {
			if item.TTL() > grantedFor {
				t.Errorf("by %s: %s counts for %s", ref, key, item.TTL())
			}
		}
	}
}

// Nobody is asked for secrets over a network that others can read.
func TestNoChallengeWhereOthersCanRead(t *testing.T) {
	g := newGranting(t, []byte("x"))
	a := startMirror(t, g.index, "http://127.0.0.1:1")
	h := a.handler(a.cfg.Server, a.namer)
	for remote, want := range map[string]int{"127.0.0.1:5": 2, "[::1]:5": 2, "10.0.0.1:5": 0} {
		r := httptest.NewRequest(http.MethodGet, "/v2/team/app/manifests/v1?ns=registry.corp", nil)
		r.RemoteAddr = remote
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if n := len(w.Header().Values("WWW-Authenticate")); w.Code != http.StatusUnauthorized || n != want {
			t.Errorf("%s: %d, %d challenges", remote, w.Code, n)
		}
	}
}

func FuzzToken(f *testing.F) {
	tokens, err := newTokens()
	if err != nil {
		f.Fatal(err)
	}
	good, err := tokens.seal("cG9kOnNlY3JldA==")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add("")
	f.Add(good[:20])
	f.Fuzz(func(t *testing.T, token string) {
		if got := tokens.open(token); got != "" && token != good {
			t.Errorf("%q opens as %q", token, got)
		}
	})
}
