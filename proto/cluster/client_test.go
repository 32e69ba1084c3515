package cluster

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
)

type clients struct {
	origin *OriginClient
	index  *IndexClient
}

func ignore[T any](_ T, err error) error { return err }

// calls are the methods of both clients, each given one hostile text wherever it takes a repository, a digest or a tag.
func calls() []func(t *testing.T, c clients, repo, arg string) error {
	d := func(s string) digest.Digest { return digest.Digest(s) }
	opened := func(c *registry.Content, err error) error {
		if err == nil {
			err = c.Close()
		}
		return err
	}
	none := func(*testing.T) io.Reader { return strings.NewReader("") }
	return []func(t *testing.T, c clients, repo, arg string) error{
		func(t *testing.T, c clients, r, a string) error {
			return ignore(c.origin.LocalStat(t.Context(), r, d(a)))
		},
		func(t *testing.T, c clients, r, a string) error {
			return opened(c.origin.LocalOpen(t.Context(), r, d(a), registry.Whole))
		},
		func(t *testing.T, c clients, r, a string) error {
			return c.origin.Replicate(t.Context(), r, d(a), 0, false, none(t))
		},
		func(t *testing.T, c clients, r, a string) error {
			return ignore(c.origin.Metainfo(t.Context(), r, d(a)))
		},
		func(t *testing.T, c clients, r, a string) error {
			return ignore(c.origin.Arriving(t.Context(), r, d(a), ArrivingRequest{}))
		},
		func(t *testing.T, c clients, r, a string) error { return ignore(c.origin.Owes(t.Context(), r, d(a))) },
		func(t *testing.T, c clients, r, a string) error {
			return c.origin.TakeDebt(t.Context(), d(a), Debt{Repositories: []string{r}})
		},
		func(t *testing.T, c clients, r, a string) error { return c.origin.Verify(t.Context(), r, d(a)) },
		func(t *testing.T, c clients, r, a string) error { return c.origin.VerifyMetainfo(t.Context(), r, d(a)) },
		func(t *testing.T, c clients, r, a string) error {
			return ignore(c.origin.Lease(t.Context(), r, d(a), LeaseRequest{}))
		},
		func(t *testing.T, c clients, r, a string) error {
			return ignore(c.origin.Durable(t.Context(), r, []digest.Digest{d(a)}))
		},
		func(t *testing.T, c clients, r, a string) error {
			return c.origin.PutName(t.Context(), NameRecord{Kind: a, Repository: r, Tag: a, Digest: d(a)}, "")
		},
		func(t *testing.T, c clients, r, a string) error {
			return c.origin.DeleteName(t.Context(), (*NameSigner)(nil).Deletion(NameRecord{Kind: a, Repository: r, Tag: a, Digest: d(a)}), "")
		},
		func(t *testing.T, c clients, r, a string) error {
			return c.index.PutLayer(t.Context(), r, Layer{Digest: d(a)})
		},
		func(t *testing.T, c clients, r, a string) error {
			return ignore(c.index.GetLayer(t.Context(), r, d(a)))
		},
		func(t *testing.T, c clients, r, _ string) error {
			return ignore(c.index.ListLayers(t.Context(), r, "", 1))
		},
		func(t *testing.T, c clients, r, a string) error { return c.index.DeleteLayer(t.Context(), r, d(a)) },
		func(t *testing.T, c clients, r, a string) error {
			return ignore(c.index.MountLayer(t.Context(), r, a, d(a)))
		},
		func(t *testing.T, c clients, r, a string) error { return c.index.Granted(t.Context(), r, d(a)) },
		func(t *testing.T, c clients, r, a string) error {
			return ignore(c.index.Members(t.Context(), r, []digest.Digest{d(a)}))
		},
	}
}

// entries are the methods that are about no repository, each given a hostile text as its key.
var entries = []func(t *testing.T, x *IndexClient, key string) error{
	func(t *testing.T, x *IndexClient, key string) error {
		return x.PutTokenKey(t.Context(), TokenKey{ID: key, JWK: []byte("{}")})
	},
	func(t *testing.T, x *IndexClient, key string) error {
		return x.PutRobot(t.Context(), Robot{Name: key})
	},
	func(t *testing.T, x *IndexClient, key string) error { return x.DeleteRobot(t.Context(), key) },
	func(t *testing.T, x *IndexClient, key string) error {
		return ignore(x.BlobRepositories(t.Context(), digest.Digest(key), key, 1))
	},
}

// No key makes a request leave for another entry than the one that was meant.
func TestNoKeyLeadsToAnotherEntry(t *testing.T) {
	var paths []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		paths = append(paths, r.URL.Path)
		w.WriteHeader(http.StatusNotFound)
	}))
	defer srv.Close()
	index, err := NewIndexClient(srv.URL, srv.Client())
	if err != nil {
		t.Fatal(err)
	}
	for i, call := range entries {
		for _, h := range hostile {
			paths = nil
			err := call(t, index, h)
			for _, p := range paths {
				if rest, ok := strings.CutPrefix(p, "/v2/_kraken/"); !ok || !strings.HasSuffix(rest, "/"+h) || strings.Count(rest, "/") != 1 {
					t.Errorf("method %d, %.40q: %s, %v", i, h, p, err)
				}
			}
			if err == nil {
				t.Errorf("method %d, %.40q: no error", i, h)
			}
		}
	}
}

var hostile = []string{
	"", ".", "..", "/", "?", "#", "a/../b", "../x", "_kraken/names/" + strings.Repeat("0", 64), "_kraken/metainfo/x", "%2e%2e", "%2f", "a%2fb",
	"x?y=z", "x#y", "a/blobs/uploads", "a/tags/list", "_kraken", "x\r\nHost: y", "x y", "\x00", "a\\b", "sha256:..", digest.FromString("x").String() + "/..",
	"sha256:" + strings.Repeat("0", 63) + "/", "A", strings.Repeat("a", 2000), "//evil", "::1", "ä",
}

// No value makes a request leave for another repository than the one that was meant, nor out of the extension; each has
// the version.
func TestNoValueLeadsToAnotherRoute(t *testing.T) {
	var mu sync.Mutex
	var asked []*http.Request
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, r)
		w.WriteHeader(http.StatusNotFound)
	}))
	defer srv.Close()
	origin, err := NewOriginClient(srv.URL, srv.Client())
	if err != nil {
		t.Fatal(err)
	}
	index, err := NewIndexClient(srv.URL, srv.Client())
	if err != nil {
		t.Fatal(err)
	}
	// Those of calls, entries, and Names, Pending, Hold, Upstreams and Access, which take no value that a path could
	// have.
	common := reflect.TypeFor[*registry.Client]().NumMethod()
	if n := reflect.TypeFor[*OriginClient]().NumMethod() + reflect.TypeFor[*IndexClient]().NumMethod() - 2*common; n != len(calls())+len(entries)+5 {
		t.Errorf("the clients have %d methods, and this test knows %d: add the others to calls", n, len(calls())+len(entries)+5)
	}
	good := digest.FromString("good").String()
	for i, call := range calls() {
		for _, h := range hostile {
			for _, in := range [][2]string{{h, good}, {"demo/app", h}, {h, h}} {
				asked = nil
				err := call(t, clients{origin, index}, in[0], in[1])
				for _, r := range asked {
					repo, _, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/_kraken/")
					if !ok || repo != in[0] || registry.CheckName(repo) != nil || r.Header.Get(VersionHeader) != "1" {
						t.Errorf("method %d, %.40q of %.40q: %s %s, %v", i, in[1], in[0], r.Method, r.RequestURI, r.Header)
					}
				}
				var known *registry.Error
				if err == nil || !errors.As(err, &known) {
					t.Errorf("method %d, %.40q of %.40q: %v is no error of the table", i, in[1], in[0], err)
				}
			}
		}
	}
}
