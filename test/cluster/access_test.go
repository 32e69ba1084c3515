package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/crypto/bcrypt"

	"kraken/proto/audit"
	"kraken/proto/registry"
	"kraken/proxy/login"
)

const accessRules = `
groups:
  - {name: devs, members: [ann]}
rules:
  - {repositories: ["public/**"], subjects: [anonymous], allow: [pull]}
  - {repositories: ["home/${user}/**"], subjects: [authenticated], allow: [pull, push, delete, overwrite]}
  - {repositories: ["team/**", "public/**"], groups: [devs], allow: [pull, push, delete, overwrite]}
  - {repositories: ["team/**"], subjects: [ci], allow: [pull, push]}
  - {repositories: ["node/**"], subjects: ["node:*"], allow: [pull]}
  - {repositories: ["**"], subjects: [root], allow: [pull, push, delete, overwrite]}
`

// controlled is a cluster whose proxies and agents ask who somebody is.
type controlled struct {
	*Cluster
	dir string
}

func newControlled(t *testing.T, agents int) *controlled {
	t.Helper()
	x := &controlled{dir: t.TempDir()}
	x.Cluster = startWith(t, 3, agents, false, func(s map[string]map[string]any) {
		x.write(t, "rules.yaml", accessRules)
		x.write(t, "htpasswd", htpasswd(t, "ann", "ci", "eve", "root"))
		s["proxy"]["access"] = map[string]any{"rules": x.path("rules.yaml"), "htpasswd": x.path("htpasswd"), "key_lifetime": "5s", "audit": x.path("audit.jsonl")}
		s["agent"]["access"] = map[string]any{
			"rules": x.path("rules.yaml"), "realm": "http://proxy.test/token",
			"audit": x.path("agents.jsonl"),
			"modes": []map[string]any{{"repositories": "public/**", "mode": "public"}, {"repositories": "node/**", "mode": "node"}, {"repositories": "**", "mode": "caller"}},
		}
	})
	return x
}

func (x *controlled) path(name string) string { return filepath.Join(x.dir, name) }

// write puts a file in the place of the one before, whole.
func (x *controlled) write(t *testing.T, name, text string) {
	t.Helper()
	tmp := x.path(name + ".new")
	if err := errors.Join(os.WriteFile(tmp, []byte(text), 0o600), os.Rename(tmp, x.path(name))); err != nil {
		t.Fatal(err)
	}
}

// htpasswd has users whose passwords are their names.
func htpasswd(t *testing.T, users ...string) string {
	t.Helper()
	var out string
	for _, u := range users {
		h, err := bcrypt.GenerateFromPassword([]byte(u), bcrypt.MinCost)
		if err != nil {
			t.Fatal(err)
		}
		out += u + ":" + string(h) + "\n"
	}
	return out
}

// shows adds credentials to each request.
type shows struct{ user, password, token string }

func (s shows) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	switch {
	case s.token != "":
		r.Header.Set("Authorization", "Bearer "+s.token)
	case s.user != "":
		r.SetBasicAuth(s.user, s.password)
	}
	return http.DefaultTransport.RoundTrip(r)
}

// as is a client that shows a user's password, or nothing.
func (x *controlled) as(t *testing.T, user string) *registry.Client {
	t.Helper()
	return x.at(t, x.ProxyURL, shows{user: user, password: user})
}

func (x *controlled) at(t *testing.T, base string, s shows) *registry.Client {
	t.Helper()
	c, err := registry.NewClient(base, &http.Client{Transport: s})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// token asks the proxy's service, as a user.
func (x *controlled) token(t *testing.T, user, scope string) string {
	t.Helper()
	return x.tokenOf(t, shows{user: user, password: user}, scope)
}

func (x *controlled) tokenOf(t *testing.T, s shows, scope string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", x.ProxyURL+"/token?scope="+url.QueryEscape(scope), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var a struct {
		Token string `json:"token"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&a); err != nil || a.Token == "" {
		t.Fatalf("token: %s, %v", resp.Status, err)
	}
	return a.Token
}

// kindOf names what an error of a client is.
func kindOf(err error) string {
	for name, kind := range map[string]error{"401": registry.ErrUnauthorized, "403": registry.ErrDenied} {
		if errors.Is(err, kind) {
			return name
		}
	}
	if err != nil {
		return err.Error()
	}
	return "ok"
}

// Subject × action × repository, on a whole cluster.
func TestAccessTable(t *testing.T) {
	x := newControlled(t, 0)
	ctx := t.Context()
	ready(t, x)
	root := x.as(t, "root")
	raws, layers := map[string][]byte{}, map[string]digest.Digest{}
	repos := []string{"public/a", "team/a", "home/eve/a"}
	for i, repo := range repos {
		layer := noise(1000, byte(i+1))
		raws[repo], _ = image(t, root, repo, "v1", layer)
		layers[repo] = digest.FromBytes(layer)
	}
	other := func(repo string) []byte {
		return append(bytes.TrimSuffix(raws[repo], []byte("}")), []byte(`,"annotations":{"a":"b"}}`)...)
	}
	actions := []struct {
		name string
		do   func(c *registry.Client, repo string) error
	}{
		{"pull", func(c *registry.Client, repo string) error {
			_, err := c.GetManifest(ctx, repo, registry.Reference{Tag: "v1"}, registry.GetOptions{})
			return err
		}},
		{"blob", func(c *registry.Client, repo string) error {
			_, err := c.StatBlob(ctx, repo, layers[repo])
			return err
		}},
		{"tags", func(c *registry.Client, repo string) error {
			_, err := c.ListTags(ctx, repo, registry.Page{N: 10})
			return err
		}},
		{"upload", func(c *registry.Client, repo string) error {
			_, err := c.StartUpload(ctx, repo, registry.UploadOptions{Size: -1})
			return err
		}},
		{"push", func(c *registry.Client, repo string) error {
			_, err := c.PutManifest(ctx, repo, registry.Reference{Tag: "v1"}, v1.MediaTypeImageManifest, raws[repo], registry.PutOptions{})
			return err
		}},
		{"overwrite", func(c *registry.Client, repo string) error {
			_, err := c.PutManifest(ctx, repo, registry.Reference{Tag: "v1"}, v1.MediaTypeImageManifest, other(repo), registry.PutOptions{})
			if err == nil {
				_, err = root.PutManifest(ctx, repo, registry.Reference{Tag: "v1"}, v1.MediaTypeImageManifest, raws[repo], registry.PutOptions{})
			}
			return err
		}},
		{"delete", func(c *registry.Client, repo string) error {
			err := c.DeleteManifest(ctx, repo, registry.Reference{Tag: "v1"})
			if err == nil {
				_, err = root.PutManifest(ctx, repo, registry.Reference{Tag: "v1"}, v1.MediaTypeImageManifest, raws[repo], registry.PutOptions{})
			}
			return err
		}},
	}
	reads := map[string]bool{"pull": true, "blob": true, "tags": true}
	for _, c := range []struct {
		user, repo string
		may        string // of the actions
	}{
		{"", "public/a", "pull blob tags"},
		{"", "team/a", ""},
		{"eve", "public/a", "pull blob tags"},
		{"eve", "team/a", ""},
		{"eve", "home/eve/a", "pull blob tags upload push overwrite delete"},
		{"ann", "home/eve/a", ""},
		{"ann", "team/a", "pull blob tags upload push overwrite delete"},
		{"ann", "public/a", "pull blob tags upload push overwrite delete"},
		{"ci", "team/a", "pull blob tags upload push"},
		{"ci", "public/a", "pull blob tags"},
	} {
		client := x.as(t, c.user)
		for _, a := range actions {
			want := "403"
			switch {
			case strings.Contains(" "+c.may+" ", " "+a.name+" "):
				want = "ok"
			case c.user == "":
				want = "401"
			}
			if got := kindOf(a.do(client, c.repo)); got != want {
				t.Errorf("%q does %s at %s: %s, want %s (reads %v)", c.user, a.name, c.repo, got, want, reads[a.name])
			}
		}
	}
	for user, want := range map[string]string{"": "public/a", "eve": "home/eve/a public/a", "ann": "public/a team/a", "root": "home/eve/a public/a team/a"} {
		l, err := x.as(t, user).ListRepositories(ctx, registry.Page{N: 100})
		if got := strings.Join(l.Names, " "); err != nil || got != want {
			t.Errorf("%q sees %q, want %q (%v)", user, got, want, err)
		}
	}
}

// ready waits until the proxies have keys.
func ready(t *testing.T, x *controlled) {
	t.Helper()
	Eventually(t, 20*time.Second, func() error {
		resp, err := http.Get(x.ProxyURL + "/token")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
}

// mountAt asks for a mount and returns the answer without what differs between sessions.
func mountAt(t *testing.T, x *controlled, user, repo, query string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "POST", x.ProxyURL+"/v2/"+repo+"/blobs/uploads/?"+query, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (shows{user: user, password: user}).RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, h := range []string{"Location", "Docker-Upload-Uuid", "Range", "Docker-Content-Digest", "Oci-Chunk-Min-Length"} {
		if resp.Header.Get(h) != "" {
			names = append(names, h)
		}
	}
	return fmt.Sprint(resp.StatusCode, names, len(b))
}

// A mount takes from what the caller may pull; what it may not is answered as what is nowhere.
func TestMountTellsNothing(t *testing.T) {
	x := newControlled(t, 0)
	layer := noise(2000, 7)
	d := digest.FromBytes(layer)
	image(t, x.as(t, "root"), "team/secret", "v1", layer)
	nowhere := digest.FromString("nowhere")
	want := mountAt(t, x, "eve", "home/eve/x", "mount="+nowhere.String())
	if !strings.HasPrefix(want, "202") {
		t.Fatal(want)
	}
	for _, query := range []string{"", "&from=team/secret", "&from=no/where", "&from=public/a"} {
		if got := mountAt(t, x, "eve", "home/eve/x", "mount="+d.String()+query); got != want {
			t.Errorf("eve mounts %q: %s, want %s", query, got, want)
		}
	}
	if _, err := x.as(t, "root").StatBlob(t.Context(), "home/eve/x", d); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("eve has what she may not read: %v", err)
	}
	for _, query := range []string{"", "&from=team/secret", "&from=public/a", "&from=no/where", "&from=home/eve/x"} { // from is a hint
		if got := mountAt(t, x, "ann", "home/ann/x", "mount="+d.String()+query); !strings.HasPrefix(got, "201") {
			t.Errorf("ann mounts %q: %s", query, got)
		}
	}
	// ann has it at home now, and nobody else may take it from there
	if got := mountAt(t, x, "eve", "home/eve/x", "mount="+d.String()); got != want {
		t.Errorf("eve mounts: %s, want %s", got, want)
	}
}

// read asks an agent for a path, and returns the status with the challenge.
func read(t *testing.T, base, path string, s shows) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", base+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, resp.Header.Get("WWW-Authenticate")
}

// An agent serves a blob by a repository that has it, to whom the rules let pull there; a deletion reaches it soon.
func TestAgentAsksWhoMayPull(t *testing.T) {
	x := newControlled(t, 1)
	ready(t, x)
	root := x.as(t, "root")
	layer := noise(300_000, 9)
	d := digest.FromBytes(layer)
	for _, repo := range []string{"public/a", "team/a", "node/a"} {
		image(t, root, repo, "v1", layer)
	}
	base := x.AgentURLs[0]
	anns := shows{token: x.token(t, "ann", "repository:team/a:pull")}
	eves := shows{token: x.token(t, "eve", "repository:team/a:pull")}
	for _, c := range []struct {
		repo string
		s    shows
		want int
	}{
		{"public/a", shows{}, 200},
		{"public/b", shows{}, 404},
		{"node/a", shows{}, 200},
		{"node/b", shows{}, 404},
		{"team/a", shows{}, 401},
		{"team/a", anns, 200},
		{"team/a", eves, 403},
		{"team/b", anns, 401}, // a token for another repository
		{"team/a", shows{user: "ann", password: "ann"}, 401},
		{"home/ann/a", shows{token: x.token(t, "ann", "repository:home/ann/a:pull")}, 404},
	} {
		for _, path := range []string{"/blobs/" + d.String(), "/manifests/v1"} {
			got, challenge := read(t, base, "/v2/"+c.repo+path, c.s)
			if got != c.want || got == 401 && !strings.HasPrefix(challenge, `Bearer realm="http://proxy.test/token"`) {
				t.Errorf("%s%.10s: %d %q, want %d", c.repo, path, got, challenge, c.want)
			}
		}
	}
	if got, _ := read(t, base, "/v2/", shows{}); got != 200 {
		t.Errorf("GET /v2/ is %d", got)
	}
	if got := refusals(t, x.path("agents.jsonl")); got != "login_failed 401, login_failed 401, refused eve 403, refused eve 403" {
		t.Errorf("the audit has %s", got)
	}
	if err := root.DeleteBlob(t.Context(), "public/a", d); err != nil {
		t.Fatal(err)
	}
	Eventually(t, 5*ManifestTTL, func() error {
		if got, _ := read(t, base, "/v2/public/a/blobs/"+d.String(), shows{}); got != 404 {
			return fmt.Errorf("a blob that was deleted is %d", got)
		}
		return nil
	})
	if got, _ := read(t, base, "/v2/node/a/blobs/"+d.String(), shows{}); got != 200 {
		t.Errorf("where it was not deleted it is %d", got)
	}
}

// refusals returns the lines of an audit, sorted, those of failed logins without a name.
func refusals(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		var e audit.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.Repository != "team/a" || e.RequestID == "" {
			t.Fatalf("%v: %s", err, line)
		}
		if e.Event == audit.LoginFailed {
			e.Subject = ""
		}
		out = append(out, strings.Join(strings.Fields(fmt.Sprint(e.Event, " ", e.Subject, " ", e.Status)), " "))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// A robot's key, and tokens that were given for it, end within seconds at all proxies and agents.
func TestRobotIsRevoked(t *testing.T) {
	x := newControlled(t, 1)
	ready(t, x)
	image(t, x.as(t, "root"), "team/a", "v1", noise(1000, 3))
	x.write(t, "rules.yaml", accessRules+"  - {repositories: [\"team/**\"], subjects: [\"robot+ci\"], allow: [pull]}\n")
	index := x.index(t)
	robot, key := login.NewRobot("ci", "", time.Now(), time.Hour)
	if err := index.PutRobot(t.Context(), robot); err != nil {
		t.Fatal(err)
	}
	path := "/v2/team/a/manifests/v1"
	s := shows{user: "robot+ci", password: key}
	var token string
	Eventually(t, 20*time.Second, func() error {
		if got, _ := read(t, x.ProxyURL, path, s); got != 200 {
			return fmt.Errorf("the robot is answered %d", got)
		}
		return nil
	})
	req, err := http.NewRequestWithContext(t.Context(), "GET", x.ProxyURL+"/token?scope=repository:team/a:pull", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var a struct{ Token string }
	if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
		t.Fatal(err)
	}
	token = a.Token
	for _, base := range []string{x.ProxyURL, x.OtherProxyURL, x.AgentURLs[0]} {
		Eventually(t, 10*time.Second, func() error {
			if got, _ := read(t, base, path, shows{token: token}); got != 200 {
				return fmt.Errorf("the token is answered %d", got)
			}
			return nil
		})
	}
	if err := index.DeleteRobot(t.Context(), "ci"); err != nil {
		t.Fatal(err)
	}
	for _, base := range []string{x.ProxyURL, x.OtherProxyURL, x.AgentURLs[0]} {
		Eventually(t, 15*time.Second, func() error {
			if got, _ := read(t, base, path, shows{token: token}); got != 401 {
				return fmt.Errorf("the token is answered %d", got)
			}
			return nil
		})
	}
	if got, _ := read(t, x.ProxyURL, path, s); got != 401 {
		t.Errorf("the key is answered %d", got)
	}
}

// How long a robot's key and tokens outlive it at most, with time for a machine that is busy: proxies hear of it every
// 2 s, agents every 5 s.
const (
	endsAtProxies = 4 * time.Second
	endsAtAgents  = 8 * time.Second
)

// A robot pulls and pushes until it is revoked: nothing fails before, everything is refused soon after, and nothing
// fails in another way.
func TestRobotIsRevokedUnderLoad(t *testing.T) {
	x := newControlled(t, 1)
	ready(t, x)
	layer := noise(50_000, 8)
	image(t, x.as(t, "root"), "team/a", "v1", layer)
	x.write(t, "rules.yaml", accessRules+"  - {repositories: [\"team/**\"], subjects: [\"robot+ci\"], allow: [pull, push]}\n")
	robot, key := login.NewRobot("ci", "", time.Now(), time.Hour)
	if err := x.index(t).PutRobot(t.Context(), robot); err != nil {
		t.Fatal(err)
	}
	s := shows{user: "robot+ci", password: key}
	var token string
	for _, base := range []string{x.ProxyURL, x.OtherProxyURL, x.AgentURLs[0]} {
		Eventually(t, 20*time.Second, func() error {
			if got, _ := read(t, base, "/v2/team/a/manifests/v1", s); got != 200 {
				return fmt.Errorf("the robot is answered %d", got)
			}
			return nil
		})
		if token == "" {
			token = x.tokenOf(t, s, "repository:team/a:pull,push")
			s = shows{token: token} // the rest are asked with it
		}
	}
	s = shows{user: "robot+ci", password: key}
	pull := func(base string, s shows) func(int) error {
		c, d := x.at(t, base, s), digest.FromBytes(layer)
		return func(int) error { _, err := c.StatBlob(t.Context(), "team/a", d); return err }
	}
	push := func(base string, s shows, seed byte) func(int) error {
		c := x.at(t, base, s)
		return func(n int) error { return pushBlob(t.Context(), c, "team/a", noise(20_000+n, seed)) }
	}
	var wg sync.WaitGroup
	var revoked revocation
	for name, what := range map[string]struct {
		do  func(int) error
		end time.Duration
	}{
		"a pull with the key":           {pull(x.OtherProxyURL, s), endsAtProxies},
		"a pull with a token":           {pull(x.ProxyURL, shows{token: token}), endsAtProxies},
		"a pull with a token, by agent": {pull(x.AgentURLs[0], shows{token: token}), endsAtAgents},
		"a push with the key":           {push(x.ProxyURL, s, 1), endsAtProxies},
		"a push with a token":           {push(x.OtherProxyURL, shows{token: token}, 2), endsAtProxies},
	} {
		wg.Go(func() { untilRefused(t, name, what.do, what.end, &revoked) })
	}
	time.Sleep(2 * time.Second)
	revoked.begun.Store(true)
	if err := x.index(t).DeleteRobot(t.Context(), "ci"); err != nil {
		t.Error(err)
	}
	now := time.Now()
	revoked.at.Store(&now)
	wg.Wait()
}

// revocation of a robot. Whether it counts already is open from when it has begun until it is acknowledged.
type revocation struct {
	begun atomic.Bool
	at    atomic.Pointer[time.Time] // when it was acknowledged
}

// untilRefused does something again and again until it was refused ten times. What begins later than end after the
// revocation has to be, and what follows a refusal.
func untilRefused(t *testing.T, name string, do func(int) error, end time.Duration, revoked *revocation) {
	for n, refusals := 0, 0; refusals < 10; n++ {
		at, began := revoked.at.Load(), time.Now()
		switch err := do(n); {
		case errors.Is(err, registry.ErrUnauthorized) && revoked.begun.Load():
			refusals++
		case err != nil:
			t.Errorf("%s, the %d. time: %v", name, n, err)
			return
		case refusals > 0 || at != nil && began.Sub(*at) > end:
			t.Errorf("%s: it is let in, asked at %s, after %d refusals; the revocation was acknowledged before: %t", name, began, refusals, at != nil)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Rules, users and keys of tokens change under load, and no request fails that was right before and after.
func TestRotationUnderLoad(t *testing.T) {
	x := newControlled(t, 1)
	ready(t, x)
	image(t, x.as(t, "root"), "team/a", "v1", noise(1000, 4))
	image(t, x.as(t, "root"), "public/a", "v1", noise(1000, 5))
	const least = 100 // requests
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var served atomic.Int64
	try := func(base, path string, s shows) {
		if ctx.Err() != nil {
			return
		}
		if got, _ := read(t, base, path, s); got != 200 {
			t.Errorf("%s%s is answered %d", base, path, got)
		}
		served.Add(1)
		time.Sleep(20 * time.Millisecond)
	}
	for i, base := range []string{x.ProxyURL, x.OtherProxyURL} {
		wg.Go(func() {
			for ctx.Err() == nil {
				try(base, "/v2/team/a/manifests/v1", shows{user: "ann", password: "ann"})
			}
		})
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				token := x.token(t, "ann", "repository:team/a:pull")
				for range 5 {
					try([]string{x.OtherProxyURL, x.ProxyURL}[i], "/v2/team/a/manifests/v1", shows{token: token})
				}
				try(x.AgentURLs[0], "/v2/team/a/manifests/v1", shows{token: token})
			}
		})
	}
	stays, err := os.ReadFile(x.path("htpasswd")) // a token ends with its user's line
	if err != nil {
		t.Fatal(err)
	}
	wg.Go(func() {
		for n := 0; ctx.Err() == nil; n++ {
			x.write(t, "htpasswd", string(stays)+htpasswd(t, fmt.Sprintf("new-%d", n)))
			x.write(t, "rules.yaml", accessRules+fmt.Sprintf("  - {repositories: [\"x-%d/**\"], subjects: [ann], allow: [pull]}\n", n))
			select {
			case <-ctx.Done():
			case <-time.After(1500 * time.Millisecond):
			}
		}
	})
	began, seen := time.Now(), map[string]bool{}
	Eventually(t, 2*time.Minute, func() error {
		for _, id := range x.keyIDs(t) {
			seen[id] = true
		}
		if len(seen) < 6 || served.Load() < least {
			return fmt.Errorf("%d keys were published, and %d requests served", len(seen), served.Load())
		}
		return nil
	})
	t.Logf("%d keys, %d requests in %s", len(seen), served.Load(), time.Since(began).Round(time.Second))
}

// keyIDs returns which keys of tokens are published.
func (x *controlled) keyIDs(t *testing.T) []string {
	t.Helper()
	resp, err := http.Get(x.ProxyURL + "/.well-known/jwks.json")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var set struct {
		Keys []struct {
			ID string `json:"kid"`
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&set); err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, k := range set.Keys {
		ids = append(ids, k.ID)
	}
	return ids
}
