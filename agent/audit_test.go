package agent

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kraken/proto/audit"
	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/proto/role"
)

// linesOf reads an audit.
func linesOf(t *testing.T, file string) (out []audit.Event) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var e audit.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		out = append(out, e)
	}
	return out
}

// What an upstream refuses to the credentials of a runtime is in the audit, and never the credentials; what it gives is
// not, nor that somebody was asked for some.
func TestAuditOfCallers(t *testing.T) {
	layer := []byte("a private layer")
	o := newSource(t, layer)
	o.allow(everything)
	g := newGranting(t, layer)
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	a := startMirrorWith(t, Config{Access: Access{Audit: file}}, g.index, o.URL)
	at := "http://" + a.Addr() + "/v2/team/app/"
	others := base64.StdEncoding.EncodeToString([]byte("pod:wrong-secret"))
	var ids []string
	for _, ask := range []struct {
		authorization string
		want          int
	}{{"", 401}, {"Basic " + g.basic, 200}, {"Basic " + others, 403}, {"Bearer nonsense", 401}} {
		for _, what := range []string{"manifests/v1", "blobs/" + g.layer.String()} {
			resp, body := as(t, ask.authorization, at+what+"?ns=registry.corp")
			if resp.StatusCode != ask.want || resp.Header.Get("X-Request-Id") == "" {
				t.Fatalf("%s as %.20q: %s %s", what, ask.authorization, resp.Status, body)
			}
			if ask.want == 403 {
				ids = append(ids, resp.Header.Get("X-Request-Id"))
			}
		}
	}
	lines := linesOf(t, file)
	if len(lines) != 2 {
		t.Fatalf("%d lines: %+v", len(lines), lines)
	}
	for i, e := range lines {
		want := []string{"v1", g.layer.String()}[i]
		if e.Event != audit.Refused || !strings.HasPrefix(e.Subject, "unknown-") || e.Subject != lines[0].Subject || e.Repository != "registry.corp/team/app" || e.Reference != want ||
			e.Action != string(registry.ActionPull) || e.Status != 403 || !slices.Contains(ids, e.RequestID) || !strings.HasPrefix(e.Source, "127.0.0.1:") || e.Time.IsZero() {
			t.Errorf("%+v", e)
		}
	}
	if b, _ := os.ReadFile(file); strings.Contains(string(b), others) || strings.Contains(string(b), "wrong-secret") {
		t.Errorf("a secret is in the audit: %s", b)
	}
}

// What the rules refuse to the node is in the audit, and so are credentials that show nobody, but not as many as
// somebody likes.
func TestAuditOfRules(t *testing.T) {
	dir := t.TempDir()
	file, rules := filepath.Join(dir, "audit.jsonl"), filepath.Join(dir, "rules.yaml")
	if err := os.WriteFile(rules, []byte(`rules: [{repositories: ["infra/**"], subjects: ["node:node-7"], allow: [pull]}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	a := startWith(t, Config{
		Node: "node-7", Config: role.Config{Origins: []ring.Member{{ID: "o", URL: "http://127.0.0.1:1"}}}, Tracker: role.Endpoint{URL: "http://127.0.0.1:1"},
		Access: Access{Rules: rules, Audit: file, Realm: "http://proxy.test/token", Modes: []AccessMode{{"team/**", modeCaller}, {"**", modeNode}}},
	})
	base := "http://" + a.Addr() + "/v2/"
	as(t, "", base+"other/app/manifests/v1")
	as(t, "", base+"team/app/manifests/v1")
	for range 3 * linesAtOnce {
		as(t, "Basic "+base64.StdEncoding.EncodeToString([]byte("ann:her-secret")), base+"team/app/manifests/v1")
	}
	got := map[string]int{}
	for _, e := range linesOf(t, file) {
		if e.Event == audit.LoginFailed {
			e.Subject, _, _ = strings.Cut(e.Subject, "-")
		}
		got[fmt.Sprintf("%s %s %s %s %d", e.Event, e.Subject, e.Repository, e.Reference, e.Status)]++
	}
	failed := "login_failed unknown team/app v1 401"
	if len(got) != 2 || got["refused node:node-7 other/app v1 403"] != 1 || got[failed] < linesAtOnce || got[failed] > 2*linesAtOnce {
		t.Errorf("the audit has %v", got)
	}
	if b, _ := os.ReadFile(file); strings.Contains(string(b), "her-secret") || strings.Contains(string(b), "ann") {
		t.Errorf("what was shown is in the audit: %s", b)
	}
}

// Nobody fills the disk with refusals: of many, whatever they are about, some are written, and the next line says how
// many were not. They leave no failed login out, nor these them.
func TestAuditIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "audit.jsonl")
		a := &Agent{cfg: Config{Access: Access{Audit: file}}, log: slog.New(slog.DiscardHandler)}
		r, err := a.openRecorder()
		if err != nil {
			t.Fatal(err)
		}
		refuse := func(n int) {
			for i := range n {
				repo := fmt.Sprintf("other/app%d", i)
				r.refuse(httptest.NewRequest(http.MethodGet, "/v2/"+repo+"/manifests/v1", nil), "node:node-7", repo, registry.ActionPull, http.StatusForbidden, "no rule")
			}
		}
		fail := func(n int) {
			for range n {
				q := httptest.NewRequest(http.MethodGet, "/v2/team/app/manifests/v1", nil)
				q.SetBasicAuth("ann", "wrong")
				r.loginFailed(q, "team/app", registry.ErrUnauthorized)
			}
		}
		for kind, flood := range map[string]func(int){audit.Refused: refuse, audit.LoginFailed: fail} {
			of := func() (out []audit.Event) {
				for _, e := range linesOf(t, file) {
					if e.Event == kind {
						out = append(out, e)
					}
				}
				return out
			}
			flood(10 * linesAtOnce)
			if n := len(of()); n != linesAtOnce {
				t.Errorf("%s: %d lines of a flood, want %d", kind, n, linesAtOnce)
			}
			time.Sleep(2 * lineEvery)
			flood(1)
			flood(1)
			lines := of()
			if n := len(lines); n != linesAtOnce+2 || lines[n-2].LeftOut != 9*linesAtOnce || lines[n-1].LeftOut != 0 {
				t.Errorf("%s: after it %d lines, the last ones %+v", kind, n, lines[max(0, n-2):])
			}
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
}
