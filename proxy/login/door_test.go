package login

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/crypto/bcrypt"

	"kraken/proto/access"
	"kraken/proto/audit"
	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/registry"
)

// index is a build-index, as much as the door needs of it.
type index struct {
	mu    sync.Mutex
	state cluster.AccessState
	away  bool
	puts  int // of keys
}

// goes makes the index be away, or back.
func (x *index) goes(away bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.away = away
}

var errAway = errors.New("away")

func (x *index) Access(context.Context, cluster.AccessState) (cluster.AccessState, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.away {
		return cluster.AccessState{}, errAway
	}
	s := x.state
	s.Keys = append([]cluster.TokenKey{}, s.Keys...)
	return s, nil
}

func (x *index) PutTokenKey(_ context.Context, k cluster.TokenKey) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.away {
		return errAway
	}
	x.puts++
	x.state.Keys = append(slices.DeleteFunc(x.state.Keys, func(o cluster.TokenKey) bool { return o.ID == k.ID }), k)
	return nil
}

// rig is a door with a registry behind it that has every tag, for which a body is written.
type rig struct {
	*testing.T
	dir   string
	index *index
	door  *Door
	log   bytes.Buffer
	h     http.Handler
	idKey jose.Signer
}

const rules = `
rules:
  - {repositories: ["public/**"], subjects: [anonymous], allow: [pull]}
  - {repositories: ["team/**"], subjects: [ann], allow: [pull, push, delete]}
  - {repositories: ["team/**"], subjects: ["robot+ci", "k8s:system:serviceaccount:*"], allow: [pull]}
`

type manifests struct{ registry.ManifestWriter }

func (manifests) GetManifest(_ context.Context, _ string, _ registry.Reference, _ registry.GetOptions) (*registry.Manifest, error) {
	return &registry.Manifest{Digest: "sha256:" + digestHex, Bytes: []byte("{}")}, nil
}

func (manifests) PutManifest(context.Context, string, registry.Reference, string, []byte, registry.PutOptions) (registry.PutResult, error) {
	return registry.PutResult{Digest: "sha256:" + digestHex}, nil
}

const digestHex = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"

func newRig(t *testing.T) *rig { return newRigOf(t, rules) }

// newRigOf has rules of its own.
func newRigOf(t *testing.T, rules string) *rig {
	r := &rig{T: t, dir: t.TempDir(), index: &index{}}
	private, jwks := issuerKeys(t)
	r.idKey = private
	r.write("jwks.json", jwks)
	r.write("rules.yaml", rules)
	r.write("htpasswd", r.line("ann", "ann-secret"))
	cfg := Config{
		Rules: r.path("rules.yaml"), Htpasswd: r.path("htpasswd"), Audit: r.path("audit.jsonl"),
		OIDC: []access.IssuerConfig{{Name: "k8s", Issuer: "https://k8s.test", Audience: "kraken", Keys: r.path("jwks.json"), Require: []access.RequiredClaim{{Claim: "org", Value: "acme"}}}},
	}
	var m config.Mistakes
	if cfg.Validate(&m, "access"); len(m) > 0 {
		t.Fatal(m)
	}
	var err error
	if r.door, err = Open(cfg, r.index, slog.New(slog.NewTextHandler(&r.log, nil)), prometheus.NewRegistry()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.door.Close() })
	if err := r.door.signer.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.heard()
	mux := http.NewServeMux()
	mux.HandleFunc(TokenPath, r.door.ServeToken)
	mux.HandleFunc(JWKSPath, r.door.ServeJWKS)
	mux.Handle("/v2/", r.door.Audited(registry.Server{Access: r.door, Manifests: manifests{}, ManifestWriter: manifests{}}.Handler()))
	r.h = mux
	return r
}

func (r *rig) path(name string) string { return filepath.Join(r.dir, name) }

func (r *rig) write(name, text string) {
	r.Helper()
	tmp := r.path(name + ".new")
	if err := os.WriteFile(tmp, []byte(text), 0o600); err != nil {
		r.Fatal(err)
	}
	if err := os.Rename(tmp, r.path(name)); err != nil {
		r.Fatal(err)
	}
}

func (r *rig) line(user, password string) string {
	h, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		r.Fatal(err)
	}
	return user + ":" + string(h) + "\n"
}

// heard makes the door hear of what build-index has.
func (r *rig) heard() {
	ctx, cancel := context.WithCancel(r.Context())
	cancel()
	_ = r.door.state.Run(ctx)
}

func (r *rig) do(method, target, authorization string) *httptest.ResponseRecorder {
	q := httptest.NewRequest(method, target, strings.NewReader("{}"))
	if authorization != "" {
		q.Header.Set("Authorization", authorization)
	}
	w := httptest.NewRecorder()
	r.h.ServeHTTP(w, q)
	return w
}

func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

func (r *rig) token(authorization, scope string) string {
	r.Helper()
	w := r.do("GET", "/token?service=kraken&scope="+url.QueryEscape(scope), authorization)
	var a tokenAnswer
	if err := json.Unmarshal(w.Body.Bytes(), &a); err != nil || w.Code != 200 || a.Token == "" || a.Token != a.AccessToken || a.ExpiresIn != 300 {
		r.Fatalf("token: %d %s %v", w.Code, w.Body, err)
	}
	return "Bearer " + a.Token
}

func (r *rig) idToken(claims map[string]any) string {
	r.Helper()
	all := map[string]any{"iss": "https://k8s.test", "aud": "kraken", "sub": "system:serviceaccount:apps:web", "org": "acme", "iat": time.Now().Unix(), "exp": time.Now().Add(time.Minute).Unix()}
	for k, v := range claims {
		all[k] = v
	}
	s, err := jwt.Signed(r.idKey).Claims(all).Serialize()
	if err != nil {
		r.Fatal(err)
	}
	return s
}

// What each caller is answered: by what it shows, for a method at a repository.
func TestDoor(t *testing.T) {
	r := newRig(t)
	robot, key := NewRobot("ci", "", time.Now(), time.Hour)
	expired, old := NewRobot("old", "", time.Now().Add(-2*time.Hour), time.Hour)
	r.index.state.Robots = []cluster.Robot{robot, expired}
	r.heard()
	ann := basic("ann", "ann-secret")
	for _, c := range []struct {
		name, authorization, method, path string
		want                              int
	}{
		{"nobody enters", "", "GET", "/v2/", 401},
		{"ann enters", ann, "GET", "/v2/", 200},
		{"ann with another password", basic("ann", "x"), "GET", "/v2/", 401},
		{"a user that is not there", basic("bob", "ann-secret"), "GET", "/v2/", 401},
		{"everybody pulls what is public", "", "GET", "/v2/public/a/manifests/x", 200},
		{"ann pulls what is public", ann, "GET", "/v2/public/a/manifests/x", 200},
		{"nobody pulls what is not", "", "GET", "/v2/team/a/manifests/x", 401},
		{"ann pulls", ann, "GET", "/v2/team/a/manifests/x", 200},
		{"ann pushes", ann, "PUT", "/v2/team/a/manifests/x", 201},
		{"ann pushes elsewhere", ann, "PUT", "/v2/other/manifests/x", 403},
		{"a robot pulls", basic("robot+ci", key), "GET", "/v2/team/a/manifests/x", 200},
		{"a robot pushes", basic("robot+ci", key), "PUT", "/v2/team/a/manifests/x", 403},
		{"a robot with another key", basic("robot+ci", old), "GET", "/v2/team/a/manifests/x", 401},
		{"a robot that has ended", basic("robot+old", old), "GET", "/v2/team/a/manifests/x", 401},
		{"an ID token as password", basic("oidc", r.idToken(nil)), "GET", "/v2/team/a/manifests/x", 200},
		{"an ID token as bearer", "Bearer " + r.idToken(nil), "GET", "/v2/team/a/manifests/x", 200},
		{"an ID token for others", basic("oidc", r.idToken(map[string]any{"aud": "x"})), "GET", "/v2/team/a/manifests/x", 401},
		{"an ID token of others", basic("oidc", r.idToken(map[string]any{"org": "evil"})), "GET", "/v2/team/a/manifests/x", 401},
		{"an ID token that has ended", basic("oidc", r.idToken(map[string]any{"exp": time.Now().Add(-time.Hour).Unix()})), "GET", "/v2/team/a/manifests/x", 401},
		{"an ID token of another issuer", basic("oidc", r.idToken(map[string]any{"iss": "https://evil.test"})), "GET", "/v2/team/a/manifests/x", 401},
		{"an ID token says it is ours", "Bearer " + r.idToken(map[string]any{"iss": "kraken"}), "GET", "/v2/team/a/manifests/x", 401},
		{"another scheme", "Digest x", "GET", "/v2/public/a/manifests/x", 401},
		{"a token pulls", r.token(ann, "repository:team/a:pull"), "GET", "/v2/team/a/manifests/x", 200},
		{"a token for reading pushes", r.token(ann, "repository:team/a:pull"), "PUT", "/v2/team/a/manifests/x", 401},
		{"a token for another repository", r.token(ann, "repository:team/b:pull"), "GET", "/v2/team/a/manifests/x", 401},
		{"a token for what is denied", r.token(ann, "repository:other:pull,push"), "PUT", "/v2/other/manifests/x", 403},
		{"everybody's token enters", r.token("", ""), "GET", "/v2/", 200},
		{"everybody's token pulls what is public", r.token("", "repository:public/a:pull"), "GET", "/v2/public/a/manifests/x", 200},
		{"everybody's token pulls what is not", r.token("", "repository:team/a:pull"), "GET", "/v2/team/a/manifests/x", 401},
		{"a robot's token", r.token(basic("robot+ci", key), "repository:team/a:pull"), "GET", "/v2/team/a/manifests/x", 200},
	} {
		w := r.do(c.method, c.path, c.authorization)
		if w.Code != c.want {
			t.Errorf("%s: %d %s, want %d", c.name, w.Code, w.Body, c.want)
		}
		if challenge := w.Header().Get("WWW-Authenticate"); (w.Code == 401) != strings.HasPrefix(challenge, `Bearer realm="http://example.com/token",service="kraken"`) {
			t.Errorf("%s: %d with challenge %q", c.name, w.Code, challenge)
		}
	}
}

// A challenge names what is missing, and where a client has come.
func TestChallenge(t *testing.T) {
	r := newRig(t)
	q := httptest.NewRequest("PUT", "http://registry.example:5000/v2/team/a/manifests/x", nil)
	q.Header.Set("X-Forwarded-Proto", "https")
	w := httptest.NewRecorder()
	r.h.ServeHTTP(w, q)
	want := `Bearer realm="https://registry.example:5000/token",service="kraken",scope="repository:team/a:pull,push"`
	if got := w.Header().Get("WWW-Authenticate"); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// The OAuth2 form of a token request, and what it refuses.
func TestTokenForm(t *testing.T) {
	r := newRig(t)
	post := func(form url.Values) *httptest.ResponseRecorder {
		q := httptest.NewRequest("POST", "/token", strings.NewReader(form.Encode()))
		q.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		w := httptest.NewRecorder()
		r.h.ServeHTTP(w, q)
		return w
	}
	form := url.Values{"grant_type": {"password"}, "username": {"ann"}, "password": {"ann-secret"}, "service": {"kraken"}, "scope": {"repository:team/a:pull,push"}, "client_id": {"x"}}
	w := post(form)
	var a tokenAnswer
	if err := json.Unmarshal(w.Body.Bytes(), &a); err != nil || w.Code != 200 || a.Scope != "repository:team/a:pull,push" {
		t.Fatalf("%d %s %v", w.Code, w.Body, err)
	}
	if w := r.do("PUT", "/v2/team/a/manifests/x", "Bearer "+a.AccessToken); w.Code != 201 {
		t.Errorf("push: %d %s", w.Code, w.Body)
	}
	if w := r.do("GET", "/token", "Bearer "+a.AccessToken); w.Code != 401 {
		t.Errorf("a token for a token: %d", w.Code)
	}
	form.Set("password", "no")
	if w := post(form); w.Code != 401 || !strings.HasPrefix(w.Header().Get("WWW-Authenticate"), "Basic ") {
		t.Errorf("another password: %d %s", w.Code, w.Header())
	}
	form.Set("grant_type", "refresh_token")
	if w := post(form); w.Code != 400 || !strings.Contains(w.Body.String(), "unsupported_grant_type") {
		t.Errorf("another grant: %d %s", w.Code, w.Body)
	}
}

// A revoked robot, a removed user and changed rules count at once, also for tokens that were given before; mistakes
// leave what was, and are said.
func TestRevocation(t *testing.T) { synctest.Test(t, revocation) }

func revocation(t *testing.T) {
	r := newRig(t)
	robot, key := NewRobot("ci", "", time.Now(), time.Hour)
	r.index.state.Robots = []cluster.Robot{robot}
	r.heard()
	anns, robots := r.token(basic("ann", "ann-secret"), "repository:team/a:pull,push"), r.token(basic("robot+ci", key), "repository:team/a:pull")
	path := "/v2/team/a/manifests/x"
	want := func(what, authorization string, code int) {
		t.Helper()
		if w := r.do("GET", path, authorization); w.Code != code {
			t.Errorf("%s: %d, want %d", what, w.Code, code)
		}
	}
	want("the robot", robots, 200)
	r.index.state.Robots = nil
	r.heard()
	want("the robot's token after its end", robots, 401)
	want("the robot's key after its end", basic("robot+ci", key), 401)

	want("ann", anns, 200)
	r.write("rules.yaml", "rules: [{oops")
	time.Sleep(2 * time.Second) // files are looked at once a second
	want("ann, while the rules can't be read", anns, 200)
	if err := r.door.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "rules.yaml") || !strings.Contains(r.log.String(), "rules.yaml") {
		t.Errorf("rules that can't be read: %v, log %s", err, r.log.String())
	}
	r.write("rules.yaml", `rules: [{repositories: ["**"], subjects: [bob], allow: [pull]}]`)
	time.Sleep(2 * time.Second)
	want("ann, by other rules", anns, 403)
	r.write("htpasswd", r.line("ann", "new")+r.line("bob", "bob-secret"))
	time.Sleep(2 * time.Second)
	want("ann, who has another password", anns, 401)
	want("ann with the old password", basic("ann", "ann-secret"), 401)
	want("bob", basic("bob", "bob-secret"), 200)
	news := r.token(basic("ann", "new"), "repository:team/a:pull")
	want("ann with the new password", news, 403)
	r.write("htpasswd", r.line("bob", "bob-secret"))
	time.Sleep(2 * time.Second)
	want("ann, who was removed", news, 401)
}

// A new key signs without an outage: at another door too, before that has heard of it.
func TestKeyRotation(t *testing.T) {
	r := newRig(t)
	old := r.token(basic("ann", "ann-secret"), "repository:team/a:pull")
	other, err := Open(r.door.cfg, r.index, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	h := registry.Server{Access: other, Manifests: manifests{}}.Handler()
	if err := r.door.signer.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{r.token(basic("ann", "ann-secret"), "repository:team/a:pull"), old} {
		q := httptest.NewRequest("GET", "/v2/team/a/manifests/x", nil)
		q.Header.Set("Authorization", token)
		w := httptest.NewRecorder()
		if h.ServeHTTP(w, q); w.Code != 200 {
			t.Errorf("at another door: %d %s", w.Code, w.Body)
		}
	}
	var set jose.JSONWebKeySet
	r.heard()
	if w := r.do("GET", JWKSPath, ""); json.Unmarshal(w.Body.Bytes(), &set) != nil || len(set.Keys) != 2 {
		t.Errorf("published: %s", w.Body)
	}
	r.index.away = true
	if err := r.door.signer.renew(t.Context()); err == nil {
		t.Error("a key was published to nobody")
	}
	r.token(basic("ann", "ann-secret"), "repository:team/a:pull") // signed with the key before
}

// A key is published again while it signs, with an end that is near: that of a proxy that is gone is soon none, and a
// token outlives neither its key nor a build-index that was away.
func TestKeysAreLeased(t *testing.T) { synctest.Test(t, leased) }

func leased(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.door.signer.run(ctx) }()
	life := time.Duration(r.door.cfg.TokenLifetime)
	check := func(keys int) {
		t.Helper()
		synctest.Wait()
		now, live := time.Now(), 0
		s, err := r.index.Access(t.Context(), cluster.AccessState{})
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range s.Keys {
			if k.Expires.After(now) {
				live++
			}
			if k.Expires.After(now.Add(life + keyHold)) {
				t.Errorf("a key is good for %s", k.Expires.Sub(now))
			}
		}
		if live != keys {
			t.Errorf("%d keys are good, want %d", live, keys)
		}
		r.heard()
		if w := r.do("GET", "/v2/team/a/manifests/x", r.token(basic("ann", "ann-secret"), "repository:team/a:pull")); w.Code != 200 {
			t.Errorf("a token: %d %s", w.Code, w.Body)
		}
	}
	check(1)
	time.Sleep(time.Hour)
	check(1)
	r.index.mu.Lock()
	if r.index.puts > 40 {
		t.Errorf("a key was put %d times in an hour", r.index.puts)
	}
	r.index.mu.Unlock()
	r.index.goes(true)
	time.Sleep(time.Hour)
	r.index.goes(false)
	time.Sleep(publishEvery)
	check(1)
	time.Sleep(22 * time.Hour) // another key signs
	check(1)
	// While build-index is away when another key should sign the one before goes on, and its tokens stay good.
	time.Sleep(18 * time.Hour)
	r.index.goes(true)
	time.Sleep(3 * time.Hour)
	token := r.token(basic("ann", "ann-secret"), "repository:team/a:pull")
	r.index.goes(false)
	time.Sleep(publishEvery)
	check(2)
	if w := r.do("GET", "/v2/team/a/manifests/x", token); w.Code != 200 {
		t.Errorf("a token that the key before signed last: %d %s", w.Code, w.Body)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := len(r.index.state.Keys); n != 3 {
		t.Errorf("%d keys were made", n)
	}
}

// A build-index that has lost its database has the keys again as soon as their proxy hears of it: the one that signs,
// and the one before, whose tokens are about.
func TestKeysArePublishedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		before := r.token(basic("ann", "ann-secret"), "repository:team/a:pull")
		if err := r.door.signer.renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		token := r.token(basic("ann", "ann-secret"), "repository:team/a:pull")
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for _, run := range []func(context.Context) error{r.door.RunSigner, r.door.RunState} {
			wg.Go(func() { _ = run(ctx) })
		}
		time.Sleep(30 * time.Second)
		r.index.mu.Lock()
		r.index.state = cluster.AccessState{}
		r.index.mu.Unlock()
		time.Sleep(heardEvery + time.Second)
		// Who starts now has heard of nothing before.
		other, err := Open(r.door.cfg, r.index, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		h := registry.Server{Access: other, Manifests: manifests{}}.Handler()
		for name, token := range map[string]string{"the key that signs": token, "the key before": before} {
			q := httptest.NewRequest("GET", "/v2/team/a/manifests/x", nil)
			q.Header.Set("Authorization", token)
			w := httptest.NewRecorder()
			if h.ServeHTTP(w, q); w.Code != 200 {
				t.Errorf("a token of %s: %d %s", name, w.Code, w.Body)
			}
		}
		cancel()
		wg.Wait()
	})
}

// A proxy that starts knows no robots and gives no tokens until it has spoken with build-index: until then it is not
// ready, and a robot's key is not wrong.
func TestStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		robot, key := NewRobot("ci", "", time.Now(), time.Hour)
		r.index.state.Robots = []cluster.Robot{robot}
		r.index.goes(true)
		d, err := Open(r.door.cfg, r.index, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		h := registry.Server{Access: d, Manifests: manifests{}}.Handler()
		answer := func(user, key string) int {
			q := httptest.NewRequest("GET", "/v2/team/a/manifests/x", nil)
			q.Header.Set("Authorization", basic(user, key))
			w := httptest.NewRecorder()
			h.ServeHTTP(w, q)
			return w.Code
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for _, run := range []func(context.Context) error{d.RunSigner, d.RunState} {
			wg.Go(func() { _ = run(ctx) })
		}
		time.Sleep(10 * time.Second)
		if got := answer("robot+ci", key); got != 503 || d.Ready(ctx) == nil {
			t.Errorf("a robot at a proxy that knows none yet: %d; ready: %v", got, d.Ready(ctx))
		}
		if got := answer("ann", "ann-secret"); got != 200 {
			t.Errorf("a user: %d", got)
		}
		r.index.goes(false)
		time.Sleep(heardEvery + time.Second)
		if got := answer("robot+ci", key); got != 200 || d.Ready(ctx) != nil {
			t.Errorf("a robot: %d; ready: %v", got, d.Ready(ctx))
		}
		r.index.goes(true) // what was heard stays
		time.Sleep(time.Minute)
		if got := answer("robot+ci", key); got != 200 || d.Ready(ctx) != nil {
			t.Errorf("a robot, while build-index is away: %d; ready: %v", got, d.Ready(ctx))
		}
		r.index.goes(false)
		if got := answer("robot+other", key); got != 401 {
			t.Errorf("a robot that there is not: %d", got)
		}
		cancel()
		wg.Wait()
	})
}

// Who guesses is slowed; who was right lately is not, from the same address.
func TestThrottle(t *testing.T) { synctest.Test(t, throttled) }

func throttled(t *testing.T) {
	r := newRig(t)
	if w := r.do("GET", "/v2/", basic("ann", "ann-secret")); w.Code != 200 {
		t.Fatal(w.Code)
	}
	codes := map[int]int{}
	for i := range 20 {
		codes[r.do("GET", "/v2/", basic("ann", fmt.Sprint(i))).Code]++
	}
	if codes[401] != 5 || codes[429] != 15 {
		t.Errorf("guesses are answered %v", codes)
	}
	if w := r.do("GET", "/v2/", basic("ann", "another")); w.Header().Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	if w := r.do("GET", "/v2/", basic("ann", "ann-secret")); w.Code != 200 {
		t.Errorf("ann herself: %d", w.Code)
	}
	for i := range 100 {
		codes[r.do("GET", "/v2/", basic(fmt.Sprint("user", i), "x")).Code]++
	}
	if codes[401] > 5+30 {
		t.Errorf("of an address %d guesses are looked at", codes[401])
	}
}

// Changes and refusals are a line each, with who, from where, what and which; secrets are in none, nor in the log.
func TestAudit(t *testing.T) {
	r := newRig(t)
	id := r.idToken(map[string]any{"org": "evil"})
	token := r.token(basic("ann", "ann-secret"), "repository:team/a:pull,push")
	for _, c := range [][3]string{
		{"PUT", "/v2/team/a/manifests/x", token}, {"GET", "/v2/team/a/manifests/x", token}, {"GET", "/v2/other/manifests/x", basic("ann", "ann-secret")},
		{"GET", "/v2/", basic("ann", "guess-secret")}, {"GET", "/v2/", basic("oidc", id)}, {"GET", "/v2/", "Bearer " + id}, {"GET", "/v2/", ""},
	} {
		r.do(c[0], c[1], c[2])
	}
	b, err := os.ReadFile(r.path("audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(b)) {
		var e audit.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		if e.RequestID == "" || e.Source == "" || e.Time.IsZero() {
			t.Errorf("incomplete: %s", line)
		}
		got = append(got, fmt.Sprintf("%s %s %s %s %s %d", e.Event, e.Subject, e.Repository, e.Reference, e.Digest, e.Status))
	}
	want := []string{
		"change ann team/a x sha256:" + digestHex + " 201",
		"refused ann other x  403",
		"login_failed ann    401", "login_failed oidc    401", "login_failed     401",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	all := string(b) + r.log.String()
	for _, secret := range []string{"ann-secret", "guess-secret", id, strings.TrimPrefix(token, "Bearer "), "evil"} {
		if strings.Contains(all, secret) {
			t.Errorf("%.20q is told:\n%s", secret, all)
		}
	}
	if err := os.Rename(r.path("audit.jsonl"), r.path("audit.1")); err != nil {
		t.Fatal(err)
	}
	r.do("PUT", "/v2/team/a/manifests/y", token)
	if b, err := os.ReadFile(r.path("audit.jsonl")); err != nil || !strings.Contains(string(b), `"y"`) {
		t.Errorf("after the file was moved away: %s %v", b, err)
	}
}

func TestHtpasswdRefused(t *testing.T) {
	for text, want := range map[string]string{
		"ann":                                   "line 1: want user:hash",
		"\nann:{SHA}abc":                        "line 2: the hash of ann is not of bcrypt",
		"robot+ci:x":                            "robots",
		"anonymous:x":                           "other callers",
		"ann:$2y$20$" + strings.Repeat("a", 53): "cost 20",
	} {
		_, err := parseHtpasswd("f", []byte(text))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "abc") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}
