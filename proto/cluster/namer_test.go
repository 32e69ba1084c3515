package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kraken/proto/registry"
)

func mirroring(own ...string) *Namer {
	n := NewNamer(own)
	n.Set(Upstreams{Upstreams: []Upstream{{Registry: "docker.io"}, {Registry: "registry.corp:5000"}, {Registry: "*.example"}}, Deny: []string{"evil.example"}})
	return n
}

// Each way in, by ?ns=, by path and by a listener that stands for Docker Hub, reaches one repository; what is not
// mirrored reaches none.
func TestNames(t *testing.T) {
	n := mirroring("kraken.corp:5000", "127.0.0.1:16000")
	for _, c := range []struct{ ns, path, want string }{
		{"", "team/app", "team/app"},
		{"kraken.corp:5000", "team/app", "team/app"},
		{"Kraken.Corp:5000", "library/nginx", "library/nginx"},
		{"", "kraken.corp_5000/team/app", "team/app"},
		{"docker.io", "library/nginx", "docker.io/library/nginx"},
		{"DOCKER.io", "library/nginx", "docker.io/library/nginx"},
		{"docker.io", "nginx", "docker.io/library/nginx"},
		{"docker.io", "kraken.corp_5000/team/app", "docker.io/kraken.corp_5000/team/app"},
		{"", "docker.io/library/nginx", "docker.io/library/nginx"},
		{"kraken.corp:5000", "docker.io/library/nginx", "docker.io/library/nginx"},
		{"registry.corp:5000", "a", "registry.corp_5000/a"},
		{"", "registry.corp_5000/a", "registry.corp_5000/a"},
		{"ghcr.example", "a/b", "ghcr.example/a/b"},
		{"quay.io", "a/b", ""},
		{"", "quay.io/a/b", ""},
		{"evil.example", "a/b", ""},
		{"", "evil.example/a/b", ""},
		{"registry.corp", "a", ""},
		{"kraken.corp", "a", ""},
		{"kraken.corp:5000", "quay.io/a", ""},
		{"kraken.corp:5000", "", ""},
		{"docker.io", "", "docker.io"},
	} {
		got, err := n.Repository(c.ns, c.path)
		if got != c.want || (err != nil) != (c.want == "" && c.path != "") || err != nil && !errors.Is(err, registry.ErrNameUnknown) {
			t.Errorf("ns %q, %q: %q, %v; want %q", c.ns, c.path, got, err, c.want)
		}
	}
	hub := n.StandsFor("docker.io")
	for _, c := range [][3]string{
		{"", "library/nginx", "docker.io/library/nginx"}, {"docker.io", "library/nginx", "docker.io/library/nginx"},
		{"", "team/app", "docker.io/team/app"}, {"quay.io", "a", ""}, {"kraken.corp:5000", "team/app", ""},
	} {
		if got, err := hub.Repository(c[0], c[1]); got != c[2] || (err != nil) != (c[2] == "") {
			t.Errorf("the listener of Docker Hub, ns %q, %q: %q, %v", c[0], c[1], got, err)
		}
	}
}

// Nothing that can be pushed as the cluster's own is served for an upstream's name, and what is served for one is never
// the cluster's own, whatever is mirrored.
func TestOwnIsNeverServedForAnother(t *testing.T) {
	for name, n := range map[string]*Namer{"with upstreams": mirroring("kraken.corp"), "without": NewNamer([]string{"kraken.corp"})} {
		for _, path := range []string{"library/nginx", "nginx", "a/b/c"} {
			for _, ns := range []string{"docker.io", "quay.io", "a.example", "localhost:5000", "kraken.corp:80", "x"} {
				repo, err := n.Repository(ns, path)
				if _, _, upstreams := SplitUpstream(repo); err == nil && !upstreams {
					t.Errorf("%s: ns %s, %s is the cluster's own %s", name, ns, path, repo)
				}
			}
		}
	}
}

// Whatever a client says in ?ns= and in the path, it means a repository of the cluster's own, by no other registry's
// name, or one of a registry that is mirrored, by that registry's name; and saying it again by its path means the same.
func FuzzNamer(f *testing.F) {
	for _, s := range [][2]string{
		{"docker.io", "library/nginx"}, {"", "docker.io/library/nginx"}, {"registry.corp:5000", "a"}, {"", "registry.corp_5000/a"}, {"kraken.corp", "team/app"},
		{"evil.example", "a"}, {"a.example", "kraken.corp/x"}, {"", "kraken.corp/docker.io/x"}, {"DOCKER.IO", "x"}, {"kraken.corp:80", "x"}, {"x_1", "y"}, {"[::1]:5000", "a"},
	} {
		f.Add(s[0], s[1])
	}
	n := mirroring("kraken.corp")
	f.Fuzz(func(t *testing.T, ns, path string) {
		repo, err := n.Repository(ns, path)
		if err != nil || repo == "" || path == "" {
			return
		}
		host, _, upstreams := SplitUpstream(repo)
		foreign := ns != "" && CanonicalRegistry(ns) != "kraken.corp"
		switch {
		case foreign && !upstreams, foreign && host != CanonicalRegistry(ns):
			t.Fatalf("%q at %q is %q", path, ns, repo)
		case upstreams && !n.Upstreams().Mirrors(host):
			t.Fatalf("%q at %q is %q, of a registry that is not mirrored", path, ns, repo)
		}
		if again, err := n.Repository("", repo); upstreams && (err != nil || again != repo) {
			t.Fatalf("%q at %q is %q, and by that path %q, %v", path, ns, repo, again, err)
		}
	})
}

// What may be private is what is, and all upstreams' repositories as long as nobody has said which are.
func TestMayBePrivate(t *testing.T) {
	n := NewNamer([]string{"kraken.corp"})
	check := func(when string, want map[string]bool) {
		t.Helper()
		for repo, want := range want {
			if got := n.MayBePrivate(repo); got != want {
				t.Errorf("%s: %s: %v", when, repo, got)
			}
		}
	}
	check("nothing is known", map[string]bool{"team/app": false, "app": false, "registry.corp/team/app": true, "registry.corp/open/app": true, "registry.corp_5000/x": true})
	n.Set(Upstreams{Upstreams: []Upstream{{Registry: "registry.corp", Modes: []RepositoryMode{{Repository: "open/**", Mode: ModePublic}, {Repository: "**", Mode: ModeCaller}}}}})
	check("told", map[string]bool{"team/app": false, "app": false, "registry.corp/team/app": true, "registry.corp/open/app": false, "docker.io/library/app": false})
	n.Set(Upstreams{})
	check("nothing is mirrored", map[string]bool{"registry.corp/team/app": false})
}

// What is mirrored is known from before, follows what build-index says, and stays while that says nothing.
func TestWatch(t *testing.T) {
	var said atomic.Pointer[Upstreams] // nil: 503
	var status atomic.Int32
	status.Store(http.StatusServiceUnavailable)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v2/_kraken/upstreams" {
			t.Errorf("asked for %s", r.URL.Path)
		}
		if u := said.Load(); u != nil {
			if err := json.NewEncoder(w).Encode(u); err != nil {
				t.Error(err)
			}
			return
		}
		w.WriteHeader(int(status.Load()))
	})
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		index, err := NewIndexClient("http://build-index", &http.Client{Transport: inProcess{handler}})
		if err != nil {
			t.Fatal(err)
		}
		n, kept := NewNamer([]string{"k"}), 0
		var full atomic.Bool
		keep := func([]byte) error {
			if full.Load() {
				return errors.New("no space left on device")
			}
			kept++
			return nil
		}
		var logged bytes.Buffer
		done := make(chan error, 1)
		go func() {
			done <- n.Watch(ctx, index, slog.New(slog.NewTextHandler(&logged, nil)), []byte(`{"upstreams":[{"registry":"docker.io"}]}`), keep)
		}()
		synctest.Wait()
		check := func(what, host string, want bool, keeps int) {
			t.Helper()
			synctest.Wait() // the watcher is asleep, and what it has written is seen
			if n.Upstreams().Mirrors(host) != want || kept != keeps {
				t.Errorf("%s: %+v, kept %d times", what, n.Upstreams(), kept)
			}
		}
		check("from before", "docker.io", true, 0)
		said.Store(&Upstreams{Upstreams: []Upstream{{Registry: "quay.io"}}})
		time.Sleep(3 * time.Second)
		check("soon after a failure", "quay.io", true, 1)
		time.Sleep(2 * watchEvery)
		check("the same again", "quay.io", true, 1)
		said.Store(nil)
		time.Sleep(10 * watchEvery)
		check("silent", "quay.io", true, 1)
		status.Store(http.StatusNotFound)
		time.Sleep(2 * watchEvery)
		check("an older version", "quay.io", false, 2)
		full.Store(true)
		said.Store(&Upstreams{Upstreams: []Upstream{{Registry: "ghcr.io"}}})
		time.Sleep(10 * watchEvery)
		check("it can't be kept", "ghcr.io", true, 2)
		if n := strings.Count(logged.String(), "no space left"); n != 1 {
			t.Errorf("that it can't be kept is said %d times", n)
		}
		full.Store(false)
		said.Store(&Upstreams{}) // as what was kept last
		time.Sleep(2 * watchEvery)
		check("it can be kept again", "ghcr.io", false, 3)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// Who has never heard what is mirrored asks each second: until then it is a mirror of nothing.
func TestWatchWithoutMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var up atomic.Bool
		index, err := NewIndexClient("http://build-index", &http.Client{Transport: inProcess{http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !up.Load() {
				w.WriteHeader(http.StatusServiceUnavailable)
			} else if err := json.NewEncoder(w).Encode(Upstreams{Upstreams: []Upstream{{Registry: "quay.io"}}}); err != nil {
				t.Error(err)
			}
		})}})
		if err != nil {
			t.Fatal(err)
		}
		n, done := NewNamer([]string{"k"}), make(chan error, 1)
		go func() { done <- n.Watch(ctx, index, slog.New(slog.DiscardHandler), nil, nil) }()
		time.Sleep(10*time.Minute + time.Millisecond)
		up.Store(true)
		time.Sleep(watchSoon)
		synctest.Wait()
		if !n.Upstreams().Mirrors("quay.io") {
			t.Error("a second after build-index is back it is not known what is mirrored")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// inProcess answers requests without a network.
type inProcess struct{ h http.Handler }

func (p inProcess) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	p.h.ServeHTTP(w, r)
	resp := w.Result()
	if resp.Body == nil {
		resp.Body = io.NopCloser(http.NoBody)
	}
	return resp, nil
}
