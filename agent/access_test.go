package agent

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"kraken/proto/config"
	"kraken/proto/ring"
	"kraken/proto/role"
)

// Modes are of repositories, not of users: a pattern with ${user}, which none would ever match, is refused with words,
// because the repositories that it means would be the node's.
func TestModesAreOfRepositories(t *testing.T) {
	rules := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(rules, []byte(`rules: [{repositories: ["home/${user}/**"], subjects: [authenticated], allow: [pull]}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	for pattern, want := range map[string]string{
		"home/*/**": "", "**": "",
		"home/${user}/**": "access.modes[0].repositories: ", "home/x-${user}": "write home/x-*", "home/": "access.modes[0].repositories: ",
	} {
		var m config.Mistakes
		a := Access{Rules: rules, Realm: "http://proxy.test/token", Modes: []AccessMode{{pattern, modeCaller}}}
		a.validate(&m, "access")
		if err := m.Err(); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", pattern, err, want)
		}
	}
}

// The catalog has no repository of mode caller, of which its upstream alone says who may see it, with rules and
// without, and whatever is shown, and none of upstreams' as long as it is not known which are.
func TestCatalogWithoutPrivateNames(t *testing.T) {
	rules := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(rules, []byte(`rules: [{repositories: ["**"], subjects: [anonymous], allow: [pull]}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	g := newGranting(t, []byte("x"))
	var silent atomic.Bool // about upstreams
	front := g.index.Server.Config.Handler
	g.index.Server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/v2/_catalog":
			fmt.Fprint(w, `{"repositories":["docker.io/library/app","registry.corp/open/app","registry.corp/team/app","team/app"]}`)
		case r.URL.Path == "/v2/_kraken/upstreams" && silent.Load():
			w.WriteHeader(http.StatusServiceUnavailable)
		default:
			front.ServeHTTP(w, r)
		}
	})
	for what, access := range map[string]Access{"without rules": {}, "with rules": {Rules: rules}} {
		t.Run(what, func(t *testing.T) {
			t.Cleanup(http.DefaultClient.CloseIdleConnections)
			silent.Store(true)
			a := startWith(t, Config{
				Config: role.Config{Origins: []ring.Member{{ID: "o", URL: "http://127.0.0.1:1"}}}, Tracker: role.Endpoint{URL: "http://127.0.0.1:1"}, BuildIndex: role.Endpoint{URL: g.URL},
				Access: access,
			})
			check := func(when string, want ...string) {
				t.Helper()
				for _, authorization := range []string{"", "Basic " + g.basic} {
					resp, body := as(t, authorization, "http://"+a.Addr()+"/v2/_catalog")
					var got struct{ Repositories []string }
					if err := json.Unmarshal([]byte(body), &got); err != nil || !slices.Equal(got.Repositories, want) {
						t.Errorf("%s, as %.6q: %s %s, want %q", when, authorization, resp.Status, body, want)
					}
				}
			}
			check("told nothing", "team/app")
			silent.Store(false)
			eventually(t, "it knows what is mirrored", a.namer.Known)
			check("told", "docker.io/library/app", "registry.corp/open/app", "team/app")
		})
	}
}
