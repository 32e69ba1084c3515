package registry

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
)

// A route whose parts are valid is written as a path that is read as the same route.
func FuzzParseRoute(f *testing.F) {
	d := digest.FromString("x").String()
	for _, s := range []string{
		"", "_catalog", "a/b/manifests/v1", "a/manifests/_kraken", "a/blobs/uploads/", "a/blobs/uploads/id", "a/blobs/" + d, "a/blobs/uploads/blobs/" + d,
		"_kraken/names", "//", "a/_kraken/_kraken/b", "a/_kraken/blobs/" + d, "a/tags/list", "a/tags/list/tags/list", "a/manifests/b/manifests/v1", "../manifests/v1",
		"blobs/blobs/uploads/uploads", "a/referrers/" + d, "a/manifests/..", "a/_kraken/names/" + strings.Repeat("0", 64),
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		rt, ok := parseRoute(s)
		if !ok {
			return
		}
		if rt.repo != "" && !strings.HasPrefix(s, rt.repo) {
			t.Errorf("parseRoute(%q) = %+v", s, rt)
		}
		p, err := rt.path()
		if err != nil {
			return
		}
		if p != s && p != s+"/" {
			t.Errorf("%q is %+v, which is written %q", s, rt, p)
		}
		if again, ok := parseRoute(p); !ok || again != rt {
			t.Errorf("%+v is written %q and read as %+v", rt, p, again)
		}
	})
}

// Whatever the parts are, a route that can be written is read as what it was.
func FuzzRoutePath(f *testing.F) {
	f.Add("upload", "a/blobs/uploads", "_kraken/names/x")
	f.Add("extension", "", "names")
	f.Add("manifest", "manifests", "tags")
	f.Fuzz(func(t *testing.T, kind, repo, arg string) {
		rt := route{kind, repo, arg}
		p, err := rt.path()
		if err != nil {
			return
		}
		u, err := url.Parse("http://x/v2/" + p)
		if err != nil || u.RawQuery != "" || u.Fragment != "" || hidesSlash(u.RawPath) {
			t.Fatalf("%+v is written %q: %v", rt, p, err)
		}
		got, ok := parseRoute(strings.TrimPrefix(u.Path, "/v2/"))
		if kind == "" || kind == "catalog" {
			rt.repo, rt.arg = "", ""
		}
		if !ok || got != rt {
			t.Errorf("%+v is written %q and read as %+v, %v", rt, p, got, ok)
		}
	})
}

// call is one method of a Client, given one hostile text wherever it takes a repository, a digest, a tag or a session's
// id.
type call struct {
	kind string
	do   func(t *testing.T, c *Client, repo, arg string) error
}

func ignore[T any](_ T, err error) error { return err }

func clientCalls() []call {
	d := func(s string) digest.Digest { return digest.Digest(s) }
	opened := func(c *Content, err error) error {
		if err == nil {
			err = c.Close()
		}
		return err
	}
	none := func(*testing.T) io.Reader { return strings.NewReader("") }
	return []call{
		{"blob", func(t *testing.T, c *Client, r, a string) error { return ignore(c.StatBlob(t.Context(), r, d(a))) }},
		{"blob", func(t *testing.T, c *Client, r, a string) error {
			return opened(c.OpenBlob(t.Context(), r, d(a), Range{3, 5}))
		}},
		{"blob", func(t *testing.T, c *Client, r, a string) error { return c.DeleteBlob(t.Context(), r, d(a)) }},
		{"uploads", func(t *testing.T, c *Client, r, a string) error { return ignore(c.MountBlob(t.Context(), r, a, d(a))) }},
		{"uploads", func(t *testing.T, c *Client, r, a string) error {
			return ignore(c.StartUpload(t.Context(), r, UploadOptions{Digest: d(a), Size: 1}))
		}},
		{"upload", func(t *testing.T, c *Client, r, a string) error { return ignore(c.UploadStatus(t.Context(), r, a)) }},
		{"upload", func(t *testing.T, c *Client, r, a string) error {
			return ignore(c.WriteUpload(t.Context(), r, a, Chunk{0, 0, none(t)}))
		}},
		{"upload", func(t *testing.T, c *Client, r, a string) error {
			return ignore(c.CommitUpload(t.Context(), r, a, d(a), Chunk{0, 0, none(t)}))
		}},
		{"upload", func(t *testing.T, c *Client, r, a string) error { return c.AbortUpload(t.Context(), r, a) }},
		{"manifest", func(t *testing.T, c *Client, r, a string) error {
			return ignore(c.GetManifest(t.Context(), r, Reference{Tag: a}, GetOptions{}))
		}},
		{"manifest", func(t *testing.T, c *Client, r, a string) error {
			return ignore(c.GetManifest(t.Context(), r, Reference{Digest: d(a)}, GetOptions{}))
		}},
		{"manifest", func(t *testing.T, c *Client, r, a string) error {
			return ignore(c.StatManifest(t.Context(), r, Reference{Tag: a}))
		}},
		{"manifest", func(t *testing.T, c *Client, r, a string) error {
			return ignore(c.PutManifest(t.Context(), r, Reference{Tag: a}, "a/b", nil, PutOptions{Tags: []string{a}}))
		}},
		{"manifest", func(t *testing.T, c *Client, r, a string) error {
			return c.DeleteManifest(t.Context(), r, Reference{Tag: a})
		}},
		{"tags", func(t *testing.T, c *Client, r, a string) error {
			return ignore(c.ListTags(t.Context(), r, Page{1, a}))
		}},
		{"catalog", func(t *testing.T, c *Client, _, a string) error {
			return ignore(c.ListRepositories(t.Context(), Page{1, a}))
		}},
		{"referrers", func(t *testing.T, c *Client, r, a string) error {
			return ignore(c.ListReferrers(t.Context(), r, d(a), a, a))
		}},
		{"extension", func(t *testing.T, c *Client, r, a string) error {
			return ignore(c.StatAt(t.Context(), ExtensionPath{"_kraken", r, "blobs", a}.Endpoint(), d(a)))
		}},
		{"extension", func(t *testing.T, c *Client, r, a string) error {
			return opened(c.OpenAt(t.Context(), ExtensionPath{"_kraken", r, "blobs", a}.Endpoint(), d(a), Whole))
		}},
		{"extension", func(t *testing.T, c *Client, r, a string) error {
			return ignore(c.CallJSON(t.Context(), Request{Method: http.MethodGet, To: ExtensionPath{a, r, "blobs", a}.Endpoint()}, nil, http.StatusOK))
		}},
	}
}

var hostile = []string{
	"", ".", "..", "/", "?", "#", "a/../b", "../x", "blobs/" + digest.FromString("x").String(), "_kraken/names/" + strings.Repeat("0", 64), "_kraken/metainfo/x", "%2e%2e", "%2f", "a%2fb",
	"x?y=z", "x#y", "a/blobs/uploads", "a/tags/list", "blobs/uploads", "_kraken", "x\r\nHost: y", "x y", "\x00", "a\\b", "sha256:..", digest.FromString("x").String() + "/..",
	"sha256:" + strings.Repeat("0", 63) + "/", "A", strings.Repeat("a", 2000), "@x:1", "//evil", "::1", "ä",
}

// No value makes a request of the client leave for another route than that of the method, nor for another repository.
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
	c, err := NewClient(srv.URL, srv.Client())
	if err != nil {
		t.Fatal(err)
	}
	const known = 23 // methods that are in clientCalls, and Base, Call, Do and Ping
	if n := reflect.TypeFor[*Client]().NumMethod(); n != known {
		t.Errorf("the client has %d methods, and this test knows %d: add the others to clientCalls", n, known)
	}
	good := digest.FromString("good").String()
	for i, m := range clientCalls() {
		for _, h := range hostile {
			for _, in := range [][2]string{{h, good}, {"demo/app", h}, {h, h}} {
				asked = nil
				err := m.do(t, c, in[0], in[1])
				for _, r := range asked {
					rt, ok := parseRoute(strings.TrimPrefix(r.URL.Path, "/v2/"))
					if !ok || hidesSlash(r.URL.RawPath) || rt.kind != m.kind || rt.kind != "catalog" && rt.repo != in[0] || rt.repo != "" && CheckName(rt.repo) != nil {
						t.Errorf("method %d, %.40q of %.40q: %s %s is %+v", i, in[1], in[0], r.Method, r.RequestURI, rt)
					}
					if rt.kind == "upload" && rt.arg != in[1] {
						t.Errorf("method %d, session %.40q: %s", i, in[1], r.RequestURI)
					}
				}
				var known *Error
				if err == nil || !errors.As(err, &known) {
					t.Errorf("method %d, %.40q of %.40q: %v is no error of the table", i, in[1], in[0], err)
				}
			}
		}
	}
	if _, err := c.Call(t.Context(), Request{Method: http.MethodGet}, http.StatusOK); err == nil {
		t.Error("a request without a path was sent")
	}
}

// What is sent with escaped slashes has other segments for whoever stands in front than it would have here.
func TestEscapedSlashIsNoRoute(t *testing.T) {
	m := newMemory()
	d := digest.FromString("hello")
	m.put("a", []byte("hello"), d)
	for path, want := range map[string]int{
		"a/blobs/" + d.String():                                 200,
		"a/blobs/" + strings.Replace(d.String(), ":", "%3A", 1): 200,
		"a%2Fblobs/" + d.String():                               404,
		"a/blobs%2f" + d.String():                               404,
		"x/blobs/uploads/..%2F..%2f..%2Fa/blobs/" + d.String():  404,
		"a/blobs%5C" + d.String():                               404,
		"a/blobs/uploads/blobs/" + d.String():                   400,
	} {
		r := httptest.NewRequest(http.MethodGet, "/v2/"+path, nil)
		w := httptest.NewRecorder()
		m.server().Handler().ServeHTTP(w, r)
		if w.Code != want || want == 200 && !bytes.Equal(w.Body.Bytes(), []byte("hello")) {
			t.Errorf("GET /v2/%s: %d %s, want %d", path, w.Code, w.Body, want)
		}
	}
	w := httptest.NewRecorder()
	m.server().Handler().ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/v2/a/blobs/uploads/blobs/uploads/", nil))
	if w.Code != http.StatusBadRequest || !strings.Contains(w.Body.String(), "is a route of the API") {
		t.Errorf("a name that is a route: %d %s", w.Code, w.Body)
	}
}
