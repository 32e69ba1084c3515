package cluster

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
	"kraken/proto/transport"
)

// The table in proto/README.md and the one that is enforced are one.
func TestRightsAreWhatTheTextSays(t *testing.T) {
	b, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut(string(b), "<!-- rights -->\n")
	text, _, end := strings.Cut(text, "<!-- end of rights -->")
	if !ok || !end {
		t.Fatal("proto/README.md has no table between <!-- rights --> and <!-- end of rights -->")
	}
	var want strings.Builder
	want.WriteString("| at | request | whose certificate |\n|---|---|---|\n")
	for _, r := range Rights {
		who := "nobody's"
		switch {
		case slices.Equal(r.Roles, transport.Roles):
			who = "everybody's"
		case len(r.Roles) > 0:
			var names []string
			for _, role := range r.Roles {
				names = append(names, string(role))
			}
			who = strings.Join(names, ", ")
		}
		request := "`" + r.Methods + " " + r.Path + "`"
		if r.Path == "*" {
			request = "all else"
		}
		fmt.Fprintf(&want, "| %s | %s | %s |\n", r.At, request, who)
	}
	if text != want.String() {
		t.Errorf("proto/README.md and Rights differ; by Rights it is\n%s", want.String())
	}
}

// Each row can be met: no row before it, and no other way of writing its path, takes what it is about.
func TestEachRightCanBeMet(t *testing.T) {
	names := strings.NewReplacer("<name>", "team/app", "<digest>", "sha256:"+strings.Repeat("0", 64), "<session>", "5f3c", "<reference>", "v1")
	for _, r := range Rights {
		path := names.Replace(r.Path)
		if r.Path == "*" {
			path = "/v2/_catalog"
		}
		for _, method := range strings.Fields(strings.ReplaceAll(r.Methods, "*", "POST")) {
			for _, role := range transport.Roles {
				want := denied
				if slices.Contains(r.Roles, role) {
					want = allowed
				}
				if got := judge(r.At, method, path, role); got != want {
					t.Errorf("%s %s at %s by %s: %d, want %d", method, path, r.At, role, got, want)
				}
			}
		}
	}
}

// Each request that the clients of this package make has a row for somebody, and what has none is told from content
// that is not there.
func TestEachRequestHasARight(t *testing.T) {
	type asked struct{ at, method, path string }
	var all []asked
	at := func(role string) *httptest.Server {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			all = append(all, asked{role, r.Method, r.URL.Path})
			registry.WriteError(w, r, fmt.Errorf("%w: no such path", errNoPath))
		}))
		t.Cleanup(srv.Close)
		return srv
	}
	so, sx := at("origin"), at("build-index")
	o, err := NewOriginClient(so.URL, so.Client())
	if err != nil {
		t.Fatal(err)
	}
	x, err := NewIndexClient(sx.URL, sx.Client())
	if err != nil {
		t.Fatal(err)
	}
	good := digest.FromString("good").String()
	requests := []func() error{
		func() error { return o.Names(t.Context(), nil) },
		func() error { return o.Pending(t.Context(), nil) },
		func() error { return ignore(o.Hold(t.Context(), HolderRequest{})) },
		func() error { return ignore(x.Access(t.Context(), AccessState{})) },
		func() error { return ignore(x.Upstreams(t.Context())) },
	}
	for _, call := range calls() {
		requests = append(requests, func() error { return call(t, clients{o, x}, "demo/app", good) })
	}
	for _, call := range entries {
		requests = append(requests, func() error { // a digest is the key of some, a name of others
			return errors.Join(call(t, x, "good"), call(t, x, good))
		})
	}
	for i, request := range requests {
		all = nil
		err := request()
		for _, a := range all {
			if v := judge(a.at, a.method, a.path, "nobody's"); v != denied {
				t.Errorf("no role may %s %s at %s", a.method, a.path, a.at)
			}
			if a.method != http.MethodHead && (errors.Is(err, registry.ErrBlobUnknown) || !errors.Is(err, registry.ErrUnsupported)) {
				t.Errorf("%s %s, for which nobody has a right: %v", a.method, a.path, err)
			}
		}
		if len(all) == 0 {
			t.Errorf("request %d was not sent: %v", i, err)
		}
	}
}

// A role can't serve what nobody has a right to, nor leave out what somebody has.
func TestExtensionIsWhatRightsSay(t *testing.T) {
	var routes []Route
	for _, r := range Rights {
		if r.At == "origin" && strings.Contains(r.Path, "/_kraken/") {
			methods := r.Methods
			if methods == "GET" && strings.HasSuffix(r.Path, "/blobs") {
				methods = "HEAD GET"
			}
			routes = append(routes, Route{Methods: methods, Path: r.Path, Serve: func(w http.ResponseWriter, r *http.Request, x registry.ExtensionPath) error {
				w.Header().Set("X-Served", r.Method+" "+x.Pattern())
				return nil
			}})
		}
	}
	serve, err := ServeExtension(transport.RoleOrigin, routes)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ServeExtension(transport.RoleOrigin, append(routes[1:], Route{Methods: "GET", Path: "/v2/<name>/_kraken/secrets"})); err == nil ||
		!strings.Contains(err.Error(), "GET "+routes[0].Path) || !strings.Contains(err.Error(), "GET /v2/<name>/_kraken/secrets is served") {
		t.Errorf("a route that is missing, and one too many: %v", err)
	}
	if _, err := ServeExtension(transport.RoleOrigin, append(routes, Route{Methods: "HEAD", Path: "/v2/_kraken/names"})); err == nil {
		t.Error("HEAD without GET is served")
	}
	h := registry.Server{Dialect: Dialect(), Extension: serve}.Handler()
	for request, want := range map[string]string{
		"GET /v2/a/_kraken/arriving/x": "GET /v2/<name>/_kraken/arriving", "HEAD /v2/a/_kraken/blobs/x": "HEAD /v2/<name>/_kraken/blobs",
		"HEAD /v2/a/_kraken/arriving/x": "", "HEAD /v2/_kraken/names": "",
		"GET /v2/_kraken/names": "GET /v2/_kraken/names", "GET /v2/a/_kraken/names": "", "PUT /v2/_kraken/names/x": "", "GET /v2/a/_kraken/unheard": "",
	} {
		method, path, _ := strings.Cut(request, " ")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		if got := w.Header().Get("X-Served"); got != want || (want == "") != (w.Code == http.StatusMethodNotAllowed) {
			t.Errorf("%s: %d, served as %q, want %q", request, w.Code, got, want)
		}
	}
}

func TestJudge(t *testing.T) {
	for _, c := range []struct {
		at, method, path string
		role             transport.Role
		want             verdict
	}{
		{"origin", "HEAD", "/v2/a/blobs/sha256:x", agent, allowed},
		{"origin", "PUT", "/v2/a/blobs/uploads/x?y", agent, denied},
		{"origin", "GET", "/v2", agent, allowed},
		{"origin", "GET", "/v2x", agent, noPath},
		{"origin", "GET", "/v2//_kraken/names", agent, noPath},
		{"origin", "GET", "/v2/_kraken/names", agent, denied},
		{"origin", "GET", "/v2/_kraken/names/x", agent, denied},
		{"origin", "PUT", "/v2/a/_kraken/names/x", agent, denied},
		{"origin", "PUT", "/v2/a/_other/names/x", buildIndex, noPath},
		{"origin", "PATCH", "/v2/a/_kraken/names/x", buildIndex, noMethod},
		{"origin", "PATCH", "/v2/a/_kraken/unheard/x", buildIndex, noPath},
		{"origin", "OPTIONS", "/v2/a/blobs/uploads/", proxy, allowed},
		{"origin", "OPTIONS", "/v2/a/blobs/uploads/", agent, denied},
		{"origin", "BREW", "/v2/a/blobs/sha256:x", agent, noMethod},
		{"origin", "GET", "/v2/a/manifests/x", agent, noPath},
		{"build-index", "PUT", "/v2/a/blobs/uploads/manifests/x", agent, denied}, // whatever a server makes of the name
		{"build-index", "GET", "/v2/_catalog", agent, denied},
		{"tracker", "GET", "/blobs/sha256:x/torrent", operator, allowed},
		{"tracker", "GET", "/blobs/sha256:x/y/torrent", operator, noPath},
		{"admin", "PUT", "/limits", agent, denied},
		{"admin", "PUT", "/limits", monitor, denied},
		{"admin", "PUT", "/limits", operator, allowed},
		{"admin", "GET", "/metrics", monitor, allowed},
		{"agent", "GET", "/v2/a/manifests/x", agent, denied},
		{"proxy", "GET", "/v2/a/manifests/x", agent, denied},
		{"proxy", "PUT", "/v2/a/manifests/x", client, allowed},
		{"warehouse", "GET", "/health", operator, noPath},
		{"origin", "GET", "/health", "warden", denied},
	} {
		if got := judge(c.at, c.method, c.path, c.role); got != c.want {
			t.Errorf("%s %s at %s by %s: %d, want %d", c.method, c.path, c.at, c.role, got, c.want)
		}
	}
}

// shown is a request with a verified certificate.
func shown(method, path, commonName string, uris ...string) *http.Request {
	r := httptest.NewRequest(method, path, nil)
	c := &x509.Certificate{Subject: pkix.Name{CommonName: commonName}}
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			panic(err)
		}
		c.URIs = append(c.URIs, u)
	}
	r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{c}, VerifiedChains: [][]*x509.Certificate{{c}}}
	return r
}

func TestGuard(t *testing.T) {
	names := map[transport.Role][]string{buildIndex: {"build-index"}, agent: {"agent"}}
	lenient, required := Identities{Names: names}, Identities{Cluster: "prod", Required: true}
	const own = "/v2/_kraken/names" // build-index's
	for name, c := range map[string]struct {
		at   string
		ids  Identities
		r    *http.Request
		want int
		who  string // as Caller says
	}{
		"identity":                 {"origin", required, shown("GET", own, "x", "kraken://prod/build-index/b"), 200, "kraken://prod/build-index/b"},
		"another role":             {"origin", required, shown("GET", own, "build-index", "kraken://prod/agent/build-index"), 403, ""},
		"another cluster":          {"origin", required, shown("GET", own, "x", "kraken://test/build-index/b"), 403, ""},
		"another cluster, lenient": {"origin", Identities{Cluster: "prod", Names: names}, shown("GET", own, "x", "kraken://test/build-index/b"), 403, ""},
		"unknown role":             {"origin", required, shown("GET", "/health", "x", "kraken://prod/warden/b"), 403, ""},
		"two identities":           {"origin", lenient, shown("GET", own, "build-index", "kraken://prod/build-index/b", "kraken://prod/agent/b"), 403, ""},
		"identity of no form":      {"origin", lenient, shown("GET", own, "build-index", "kraken://prod/build-index"), 403, ""},
		"none where required":      {"origin", required, shown("GET", "/health", "build-index"), 403, ""},
		"by name":                  {"origin", lenient, shown("GET", own, "build-index"), 200, ""},
		"by name and number":       {"origin", lenient, shown("GET", own, "build-index-01"), 200, ""},
		"by half a name":           {"origin", lenient, shown("GET", own, "build-index-"), 403, ""},
		"by a longer name":         {"origin", lenient, shown("GET", own, "build-index-01.example"), 403, ""},
		"by a name that begins so": {"origin", lenient, shown("GET", own, "build-indexer"), 403, ""},
		"no name that is known":    {"origin", lenient, shown("POST", "/v2/a/_kraken/lease/sha256:x", "node-17"), 200, ""},
		"no certificate":           {"origin", lenient, httptest.NewRequest("GET", "/health", nil), 403, ""},
		"no such method":           {"origin", required, shown("POST", own, "x", "kraken://prod/build-index/b"), 405, ""},
		"no such path":             {"origin", required, shown("GET", "/nowhere", "x", "kraken://prod/build-index/b"), 404, ""},
		"a person at a proxy":      {"proxy", required, shown("PUT", "/v2/a/manifests/x", "alice"), 200, "kraken:///client/alice"},
		"nobody at a proxy":        {"proxy", required, httptest.NewRequest("PUT", "/v2/a/manifests/x", nil), 200, ""},
		"a node at a proxy":        {"proxy", required, shown("PUT", "/v2/a/manifests/x", "alice", "kraken://prod/agent/n"), 403, ""},
		"a node at an admin":       {Admin, lenient, shown("GET", "/metrics", "node-17"), 403, ""},
		"an operator at an admin":  {Admin, required, shown("PUT", "/limits", "x", "kraken://prod/operator/alice"), 200, "kraken://prod/operator/alice"},
	} {
		refused := false
		h := Guard{At: c.at, Identities: c.ids, Refused: func(*http.Request, transport.Principal, error) { refused = true }}.Middleware(
			http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				if p, ok := Caller(r.Context()); c.who != "" && (!ok || p.String() != c.who) {
					t.Errorf("%s: the caller is %s, %v", name, p, ok)
				}
			}))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, c.r)
		if w.Code != c.want || refused != (c.want == 403) {
			t.Errorf("%s: %d, told %v: %s", name, w.Code, refused, w.Body)
		}
	}
}

// Without a guard nobody is known, and whoever asks may be anybody.
func TestCallerWithoutGuard(t *testing.T) {
	r := shown("GET", "/", "x", "kraken://prod/agent/a")
	if p, ok := Caller(r.Context()); ok || !MayBe(r, proxy) {
		t.Errorf("%v, %v", p, ok)
	}
	g := Guard{At: "origin", Identities: Identities{Cluster: "prod"}}
	g.Middleware(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if MayBe(r, proxy) || !MayBe(r, agent) {
			t.Error("the caller is of another role than its certificate")
		}
	})).ServeHTTP(httptest.NewRecorder(), shown("GET", "/health", "x", "kraken://prod/agent/a"))
}
