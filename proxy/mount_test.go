package proxy

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// everybody is the access of a proxy whose rules let everybody do everything.
type everybody struct{}

func (everybody) Allow(r *http.Request, _ string, _ registry.Action) (context.Context, error) {
	return r.Context(), nil
}

// sessions begins an upload where nothing is mounted.
type sessions struct{ registry.Uploads }

func (sessions) StartUpload(context.Context, string, registry.UploadOptions) (registry.Upload, error) {
	return registry.Upload{ID: "begun"}, nil
}

// A blob is mounted from an upstream's repository where that is known to be public. Before a proxy was told which are
// none is, and what is a member of the cluster's own repositories is mounted from there all the same.
func TestMountsFromUpstreams(t *testing.T) {
	d, shared := digest.FromString("a layer of registry.corp's"), digest.FromString("a layer that team/base has, too")
	has := map[string][]string{
		d.String():      {"registry.corp/open/app", "registry.corp/team/app"},
		shared.String(): {"registry.corp/team/app", "team/base"},
	}
	index := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		at := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		switch {
		case strings.HasPrefix(r.URL.Path, "/v2/_kraken/repositories/"):
			page := cluster.RepositoryPage{}
			if r.URL.Query().Get("last") == "" {
				page.Repositories = has[at]
			}
			_ = json.NewEncoder(w).Encode(page)
		case strings.Contains(r.URL.Path, "/_kraken/mount/"):
			w.WriteHeader(http.StatusCreated)
			fallthrough
		case strings.Contains(r.URL.Path, "/_kraken/layers/"):
			_ = json.NewEncoder(w).Encode(cluster.Layer{Digest: digest.Digest(at), Size: 1})
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	defer index.Close()
	client, err := cluster.NewIndexClient(index.URL, index.Client())
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{namer: cluster.NewNamer([]string{"kraken.example"}), index: client}
	h := registry.Server{Blobs: p, Mounter: p, Uploads: sessions{}, Access: everybody{}, Namer: p.namer}.Handler()
	check := func(when string, d digest.Digest, from string, want int) {
		t.Helper()
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, fmt.Sprintf("/v2/mine/app/blobs/uploads/?mount=%s&from=%s", d, from), nil))
		if w.Code != want {
			t.Errorf("%s, from %q: %d %s, want %d", when, from, w.Code, w.Body, want)
		}
	}
	for _, from := range []string{"", "registry.corp/open/app", "registry.corp/team/app"} {
		check("nothing is known", d, from, http.StatusAccepted)
		check("nothing is known, and an own repository has it", shared, from, http.StatusCreated)
	}
	u := cluster.Upstreams{Upstreams: []cluster.Upstream{{Registry: "registry.corp", Modes: []cluster.RepositoryMode{{Repository: "**", Mode: cluster.ModeCaller}}}}}
	p.namer.Set(u)
	check("all is a caller's", d, "registry.corp/open/app", http.StatusAccepted)
	u.Upstreams[0].Modes = append([]cluster.RepositoryMode{{Repository: "open/**", Mode: cluster.ModePublic}}, u.Upstreams[0].Modes...)
	p.namer.Set(u)
	for _, from := range []string{"", "registry.corp/open/app", "registry.corp/team/app"} { // from is a hint
		check("open/** is public", d, from, http.StatusCreated)
	}
}
