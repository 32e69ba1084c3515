package upstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"kraken/proto/cluster"
	"kraken/proto/config"
	"kraken/proto/registry"
	script "kraken/test/upstream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// loopback allows the other servers of a test, where realms and redirects lead.
var loopback = []string{"127.0.0.0/8", "::1/128"}

func entry(u *script.Registry) RegistryConfig {
	return RegistryConfig{Registry: u.Host, Access: Access{CA: u.CAFile, PlainHTTP: u.CAFile == ""}}
}

// everything is read with the cluster's credentials.
var everything = []cluster.RepositoryMode{{Repository: "**", Mode: cluster.ModeNode}}

func withPassword(u *script.Registry, user, password string) RegistryConfig {
	c := entry(u)
	c.Credentials = Credentials{Username: user, Password: config.NewSecret(password)}
	c.Modes = everything
	return c
}

func open(t *testing.T, cfg Config) *Set {
	t.Helper()
	s, err := Open(cfg, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func only(t *testing.T, c RegistryConfig, repo string) (*Registry, string) {
	t.Helper()
	s := open(t, Config{Registries: []RegistryConfig{c}, AllowAddresses: loopback})
	r, remote, ok := s.For(strings.Replace(c.Registry, ":", "_", 1) + "/" + repo)
	if !ok {
		t.Fatal("it is not mirrored")
	}
	return r, remote
}

func tag(s string) registry.Reference { return registry.Reference{Tag: s} }

// pull reads an image whole, as a cluster does: its tag, its manifest, each blob.
func pull(t *testing.T, r *Registry, remote string, img script.Image) error {
	t.Helper()
	d, err := r.Head(t.Context(), remote, tag("v1"))
	if err != nil {
		return err
	}
	if d.Digest != img.Manifest.Digest || d.Size != img.Manifest.Size || d.MediaType != img.Manifest.MediaType {
		return fmt.Errorf("HEAD says %+v", d)
	}
	m, err := r.Manifest(t.Context(), remote, registry.Reference{Digest: d.Digest})
	if err != nil {
		return err
	}
	if int64(len(m.Bytes)) != d.Size {
		return fmt.Errorf("the manifest has %d bytes", len(m.Bytes))
	}
	for _, l := range append(img.Layers, img.Config) {
		body, size, err := r.OpenBlob(t.Context(), remote, l.Digest, 0, -1)
		if err != nil {
			return err
		}
		b, err := io.ReadAll(body)
		if err := errors.Join(err, body.Close()); err != nil {
			return err
		}
		if size != l.Size || l.Digest.Algorithm().FromBytes(b) != l.Digest {
			return fmt.Errorf("blob %s: %d bytes of %d", l.Digest, len(b), size)
		}
	}
	return nil
}

// Each way to log in reads an image with as few requests as there can be: no ping, one 401, one token a repository.
func TestLogins(t *testing.T) {
	for name, c := range map[string]struct {
		o     script.Options
		total int
	}{
		"anonymous":      {script.Options{}, 4},
		"basic":          {script.Options{Basic: true, User: "u", Password: "p", TLS: true}, 5},
		"token":          {script.Options{Token: true, User: "u", Password: "p", TLS: true}, 6},
		"public token":   {script.Options{Token: true, Anonymous: true}, 6},
		"blob storage":   {script.Options{Token: true, User: "u", Password: "p", Storage: true}, 8},
		"TLS to storage": {script.Options{Basic: true, User: "u", Password: "p", Storage: true, TLS: true}, 7},
	} {
		t.Run(name, func(t *testing.T) {
			u := script.New(t, c.o)
			img := u.PutImage("team/app", "v1", []byte("layer"))
			cfg := entry(u)
			if c.o.User != "" {
				cfg = withPassword(u, "u", "p")
			}
			r, remote := only(t, cfg, "team/app")
			if err := pull(t, r, remote, img); err != nil {
				t.Fatal(err)
			}
			if n := u.Count("", ""); n != c.total {
				t.Errorf("%d requests, want %d: %+v", n, c.total, u.Requests())
			}
			u.Forget()
			if err := pull(t, r, remote, img); err != nil {
				t.Fatal(err)
			}
			if n := u.Count("token", ""); n != 0 {
				t.Errorf("a second pull: %+v", u.Requests())
			}
			for _, q := range u.Requests() {
				if q.Kind == "storage" && q.Authorized {
					t.Error("the other host was sent credentials")
				}
				if q.Status == http.StatusUnauthorized {
					t.Errorf("asked without what it wants: %+v", q)
				}
			}
		})
	}
}

// Any number of requests at once share one token, and one that is refused or too old is replaced once.
func TestTokensAreShared(t *testing.T) {
	u := script.New(t, script.Options{Token: true, User: "u", Password: "p"})
	u.PutImage("team/app", "v1", []byte("layer"))
	r, remote := only(t, withPassword(u, "u", "p"), "team/app")
	all := func() {
		t.Helper()
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if _, err := r.Head(t.Context(), remote, tag("v1")); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := u.Count("token", ""); n != 1 {
			t.Errorf("%d token requests", n)
		}
		u.Forget()
	}
	all()
	u.Revoke()
	all()
}

func TestWrongPassword(t *testing.T) {
	for _, o := range []script.Options{{Basic: true}, {Token: true}} {
		o.User, o.Password = "u", "p"
		u := script.New(t, o)
		u.PutImage("team/app", "v1", []byte("layer"))
		r, remote := only(t, withPassword(u, "u", "wrong"), "team/app")
		for range 2 {
			_, err := r.Head(t.Context(), remote, tag("v1"))
			if !errors.Is(err, registry.ErrUnauthorized) {
				t.Errorf("%+v: %v", o, err)
			}
			if err != nil && (strings.Contains(err.Error(), "wrong") || strings.Contains(err.Error(), "Basic")) {
				t.Errorf("the error has the password: %v", err)
			}
		}
	}
}

// 429 and Retry-After are honoured, for what was asked alone, and never come out as 429.
func TestTooManyRequests(t *testing.T) {
	u := script.New(t, script.Options{})
	img := u.PutImage("team/app", "v1", []byte("layer"))
	r, remote := only(t, entry(u), "team/app")
	u.Fail(script.Rule{Kind: "manifest", Status: http.StatusTooManyRequests, RetryAfter: 60})
	for range 3 {
		_, err := r.Manifest(t.Context(), remote, tag("v1"))
		var retry *registry.RetryError
		if !errors.Is(err, registry.ErrUnavailable) || !errors.As(err, &retry) || retry.After < 50*time.Second {
			t.Errorf("%v, %+v", err, retry)
		}
	}
	if n := u.Count("manifest", ""); n != 1 {
		t.Errorf("%d requests", n)
	}
	if _, err := r.Head(t.Context(), remote, tag("v1")); err != nil {
		t.Errorf("HEAD: %v", err)
	}
	if _, _, err := r.OpenBlob(t.Context(), remote, img.Config.Digest, 0, -1); err != nil {
		t.Errorf("blob: %v", err)
	}
}

// Who has had enough is not everybody.
func TestOthersAreAskedFor(t *testing.T) {
	u := script.New(t, script.Options{Basic: true, User: "u", Password: "p", TLS: true})
	u.PutImage("team/app", "v1", []byte("layer"))
	c := withPassword(u, "u", "p")
	r, remote := only(t, c, "team/app")
	u.Fail(script.Rule{Kind: "head", Times: 1, Status: http.StatusTooManyRequests, RetryAfter: 60})
	if _, err := r.Head(t.Context(), remote, tag("v1")); !errors.Is(err, registry.ErrUnavailable) {
		t.Error(err)
	}
	as, err := r.As(Credential{Username: "u", Password: "p"})
	if err == nil {
		_, err = as.Head(t.Context(), remote, tag("v1"))
	}
	if err != nil {
		t.Errorf("another account: %v", err)
	}
	if _, err := r.Head(t.Context(), remote, tag("v1")); !errors.Is(err, registry.ErrUnavailable) {
		t.Error(err)
	}
}

// An upstream that hangs is left alone after the first asker's deadline.
func TestHangs(t *testing.T) {
	u := script.New(t, script.Options{})
	u.PutImage("team/app", "v1", []byte("layer"))
	r, remote := only(t, entry(u), "team/app")
	u.Fail(script.Rule{Hang: true})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := r.Head(ctx, remote, tag("v1")); !errors.Is(err, registry.ErrUnavailable) {
		t.Error(err)
	}
	if got, want := r.places[0].trouble(), "does not answer"; got != want {
		t.Errorf("it %q, want %q", got, want)
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	r.places[0].forgive()
	u.Heal()
	if _, err := r.Head(ctx, remote, tag("v1")); err == nil {
		t.Error("a caller that went away has an answer")
	}
	if _, err := r.Head(t.Context(), remote, tag("v1")); err != nil {
		t.Errorf("whose caller went away is not left alone: %v", err)
	}
}

// What hangs is left alone for as long as it was waited for, however who waited has said that it was long enough: of an
// image of many blobs one costs that time, and not each.
func TestHangsAreLeftAloneForAsLong(t *testing.T) {
	for patience, want := range map[time.Duration]time.Duration{100 * time.Millisecond: firstPause, 1500 * time.Millisecond: 1500 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) { leftAlone(t, patience, want) })
	}
}

// leftAlone asks a registry that hangs, until patience is lost, and once more: it must say that it is left alone for
// want.
func leftAlone(t *testing.T, patience, want time.Duration) {
	r, remote := only(t, RegistryConfig{Registry: "registry.example"}, "team/app")
	asked := 0
	hangs := func(ctx context.Context, _ *place, _ string) (int, error) {
		asked++
		<-ctx.Done()
		return 0, context.Cause(ctx)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(patience, func() { cancel(fmt.Errorf("no patience any more: %w", context.DeadlineExceeded)) })
	if _, err := ask(ctx, r, kindBlob, remote, hangs); !errors.Is(err, registry.ErrUnavailable) {
		t.Error(err)
	}
	var retry *registry.RetryError
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	_, err := ask(ctx, r, kindBlob, remote, hangs)
	if !errors.As(err, &retry) || retry.After != want {
		t.Errorf("after %s: %v, want it left alone for %s", patience, err, want)
	}
	if asked != 1 {
		t.Errorf("%d requests", asked)
	}
}

// A token service that has enough is no refusal.
func TestTokenServiceIsBusy(t *testing.T) {
	u := script.New(t, script.Options{Token: true, User: "u", Password: "p"})
	u.PutImage("team/app", "v1", []byte("layer"))
	r, remote := only(t, withPassword(u, "u", "p"), "team/app")
	u.Fail(script.Rule{Kind: "token", Status: http.StatusTooManyRequests, RetryAfter: 30})
	if _, err := r.Head(t.Context(), remote, tag("v1")); !errors.Is(err, registry.ErrUnavailable) || errors.Is(err, registry.ErrUnauthorized) {
		t.Error(err)
	}
	if _, err := r.Head(t.Context(), remote, tag("v1")); !errors.Is(err, registry.ErrUnavailable) || u.Count("token", "") != 1 {
		t.Errorf("%v, %d", err, u.Count("token", ""))
	}
}

func TestAnswersThatLie(t *testing.T) {
	u := script.New(t, script.Options{})
	img := u.PutImage("team/app", "v1", []byte("layer"))
	other := u.PutImage("team/app", "v2", []byte("other"))
	r, remote := only(t, entry(u), "team/app")
	for name, rule := range map[string]script.Rule{
		"a bit": {Kind: "manifest", Flip: true, FlipAt: 20}, "shorter": {Kind: "manifest", Short: 3}, "longer": {Kind: "manifest", Long: 3},
		"cut": {Kind: "manifest", Cut: true, CutAt: 20}, "another": {Kind: "manifest", Digest: other.Manifest.Digest.String(), Flip: true},
	} {
		t.Run(name, func(t *testing.T) {
			undo := u.Fail(rule)
			defer undo()
			defer r.places[0].forgive()
			if m, err := r.Manifest(t.Context(), remote, registry.Reference{Digest: img.Manifest.Digest}); !errors.Is(err, registry.ErrUnavailable) {
				t.Errorf("%+v, %v", m, err)
			}
		})
	}
	u.Fail(script.Rule{Kind: "head", NoDigest: true})
	if d, err := r.Head(t.Context(), remote, tag("v1")); err != nil || d.Digest != img.Manifest.Digest {
		t.Errorf("without a digest: %+v, %v", d, err)
	}
}

func TestNotThere(t *testing.T) {
	u := script.New(t, script.Options{})
	img := u.PutImage("team/app", "v1", []byte("layer"))
	r, _ := only(t, entry(u), "team/app")
	if _, err := r.Head(t.Context(), "team/app", tag("v9")); !errors.Is(err, registry.ErrManifestUnknown) {
		t.Error(err)
	}
	if _, _, err := r.OpenBlob(t.Context(), "team/other", img.Config.Digest, 0, -1); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Error(err)
	}
}

func TestRanges(t *testing.T) {
	content := script.Random(1, 10_000)
	for _, o := range []script.Options{{}, {Storage: true}, {NoRanges: true}} {
		u := script.New(t, o)
		d := u.PutBlob("a/b", content).Digest
		r, remote := only(t, entry(u), "a/b")
		for _, c := range [][2]int64{{0, -1}, {0, 100}, {5000, 10}, {9000, -1}} {
			body, size, err := r.OpenBlob(t.Context(), remote, d, c[0], c[1])
			want := content[c[0]:]
			if c[1] >= 0 {
				want = want[:c[1]]
			}
			if o.NoRanges && c != [2]int64{0, -1} {
				if !errors.Is(err, ErrNoRange) {
					t.Fatalf("%+v, %v: %v", o, c, err)
				}
				want = content
			} else if err != nil {
				t.Fatalf("%+v, %v: %v", o, c, err)
			}
			got, err := io.ReadAll(body)
			if err := errors.Join(err, body.Close()); err != nil || size != int64(len(content)) || !bytes.Equal(got, want) {
				t.Errorf("%+v, %v: %d bytes of %d, %v", o, c, len(got), size, err)
			}
		}
	}
}

// The next endpoint is asked when one does not have it or does not answer; what none could say for sure is unavailable.
func TestEndpointsInOrder(t *testing.T) {
	first, second := script.New(t, script.Options{}), script.New(t, script.Options{})
	img := second.PutImage("mirror/team/app", "v1", []byte("layer"))
	c := RegistryConfig{Registry: "registry.example", Endpoints: []Endpoint{
		{URL: first.URL, Access: Access{PlainHTTP: true}}, {URL: second.URL + "/mirror", Access: Access{PlainHTTP: true}},
	}}
	r, remote := only(t, c, "team/app")
	if err := pull(t, r, remote, img); err != nil {
		t.Fatal(err)
	}
	resume := first.Stop()
	if _, err := r.Head(t.Context(), remote, tag("v1")); err != nil {
		t.Error(err)
	}
	if _, err := r.Head(t.Context(), remote, tag("v9")); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("one could not be asked: %v", err)
	}
	resume()
	r.places[0].forgive()
	if _, err := r.Head(t.Context(), remote, tag("v9")); !errors.Is(err, registry.ErrManifestUnknown) {
		t.Errorf("both said no: %v", err)
	}
}

// An upstream that is down costs its first asker the time, and the others nothing.
func TestDownIsLeftAlone(t *testing.T) {
	u := script.New(t, script.Options{})
	u.PutImage("team/app", "v1", []byte("layer"))
	r, remote := only(t, entry(u), "team/app")
	resume := u.Stop()
	check := func() error { return r.set.Check(t.Context()) }
	if err := check(); err != nil {
		t.Error(err)
	}
	for range 5 {
		if _, err := r.Head(t.Context(), remote, tag("v1")); !errors.Is(err, registry.ErrUnavailable) {
			t.Error(err)
		}
	}
	if err := check(); err == nil || !strings.Contains(err.Error(), u.Host) {
		t.Errorf("readiness: %v", err)
	}
	if n := u.Count("", ""); n > 2 { // net/http tries a connection from its pool again
		t.Errorf("%d requests", n)
	}
	resume()
	r.places[0].forgive()
	if _, err := r.Head(t.Context(), remote, tag("v1")); err != nil {
		t.Error(err)
	}
}

// A blob that one endpoint cuts or lies about is read from the next one.
func TestDoubtedEndpoint(t *testing.T) {
	first, second := script.New(t, script.Options{}), script.New(t, script.Options{})
	content := script.Random(1, 50_000)
	d := first.PutBlob("a/b", content).Digest
	second.PutBlob("a/b", content)
	r, remote := only(t, RegistryConfig{Registry: "registry.example", Endpoints: []Endpoint{
		{URL: first.URL, Access: Access{PlainHTTP: true}}, {URL: second.URL, Access: Access{PlainHTTP: true}},
	}}, "a/b")
	first.Fail(script.Rule{Kind: "blob", Cut: true, CutAt: 20_000})
	body, _, err := r.OpenBlob(t.Context(), remote, d, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(body)
	body.Close()
	if err == nil || len(got) != 20_000 {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if body, _, err = r.OpenBlob(t.Context(), remote, d, int64(len(got)), -1); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(body)
	body.Close()
	if err != nil || !bytes.Equal(append(got, rest...), content) || second.Count("blob", "") != 1 {
		t.Errorf("%d bytes more, %v", len(rest), err)
	}
	Doubt(body)
	first.Heal()
	if body, _, err = r.OpenBlob(t.Context(), remote, d, 0, 1); err != nil || first.Count("blob", "") != 2 {
		t.Errorf("both are doubted, the first counts: %v, %d", err, first.Count("blob", ""))
	}
	body.Close()
}

func TestOfflineAsksNobody(t *testing.T) {
	u := script.New(t, script.Options{})
	u.PutImage("team/app", "v1", []byte("layer"))
	s := open(t, Config{Registries: []RegistryConfig{entry(u), {Registry: "*"}}, Offline: true})
	for _, name := range []string{u.Alias + "/team/app", "nowhere.invalid/team/app"} {
		r, remote, ok := s.For(name)
		if !ok {
			t.Fatal(name)
		}
		began := time.Now()
		if _, err := r.Head(t.Context(), remote, tag("v1")); !errors.Is(err, registry.ErrUnavailable) || time.Since(began) > time.Second {
			t.Error(err)
		}
	}
	if n := u.Count("", ""); n != 0 {
		t.Errorf("%d requests", n)
	}
}

func TestWhatIsMirrored(t *testing.T) {
	s := open(t, Config{Registries: []RegistryConfig{{Registry: "docker.io"}, {Registry: "*.corp.example:5000"}, {Registry: "*"}}, Deny: []string{"evil.example"}})
	for name, want := range map[string]string{
		"docker.io/library/nginx": "https://registry-1.docker.io library/nginx", "a.corp.example_5000/x": "https://a.corp.example:5000 x",
		"ghcr.io/a/b": "https://ghcr.io a/b", "evil.example/a": "", "team/app": "", "nginx": "",
	} {
		r, remote, ok := s.For(name)
		if ok != (want != "") {
			t.Errorf("%s: %v", name, ok)
		} else if ok && r.places[0].url.String()+" "+remote != want {
			t.Errorf("%s: %s %s", name, r.places[0].url, remote)
		}
	}
	if _, _, ok := open(t, Config{}).For("docker.io/library/nginx"); ok {
		t.Error("nothing is configured")
	}
}

// Whoever may name registries makes this machine remember them: not in place of the configured ones, whose pauses,
// slots and rates hold, nor of those of a pattern that are used.
func TestMadeUpHostsMakeNothingForgotten(t *testing.T) {
	s := open(t, Config{Registries: []RegistryConfig{{Registry: "docker.io"}, {Registry: "*"}}})
	slotsOf := func(repo string) *slots {
		r, _, ok := s.For(repo)
		if !ok {
			t.Fatalf("%s is not mirrored", repo)
		}
		return r.blobs
	}
	configured, used, idle := slotsOf("docker.io/library/nginx"), slotsOf("ghcr.io/a/b"), slotsOf("quay.io/a/b")
	for i := range 2 * maxRegistries {
		slotsOf(fmt.Sprintf("a%d.example/x", i))
		if slotsOf("ghcr.io/a/b") != used {
			t.Fatalf("after %d others one that is used was forgotten", i+1)
		}
	}
	if slotsOf("docker.io/library/nginx") != configured {
		t.Error("the configured registry was forgotten")
	}
	if slotsOf("quay.io/a/b") == idle {
		t.Error("what nobody uses is remembered")
	}
}

// A registry that a pattern lets anybody name is none whose address an operator has written down.
func TestPatternAllowsNoAddress(t *testing.T) {
	u := script.New(t, script.Options{TLS: true})
	u.PutBlob("x", []byte("inside"))
	s := open(t, Config{Registries: []RegistryConfig{{Registry: "*", Access: Access{CA: u.CAFile}}}})
	r, remote, ok := s.For(u.Alias + "/x")
	if !ok {
		t.Fatal("it is not mirrored")
	}
	if _, err := r.StatBlob(t.Context(), remote, digest.FromString("inside")); !errors.Is(err, ErrForbiddenAddress) {
		t.Errorf("this machine was asked: %v", err)
	}
	if n := u.Count("", ""); n != 0 {
		t.Errorf("%d requests", n)
	}
}

// A caller's credential goes to the host that the name says, and nothing is shared with others.
func TestCallersCredential(t *testing.T) {
	u := script.New(t, script.Options{Token: true, Anonymous: true, Private: []string{"secret"}, User: "u", Password: "p", TLS: true})
	img := u.PutImage("secret/app", "v1", []byte("layer"))
	r, remote := only(t, entry(u), "secret/app")
	if _, err := r.Head(t.Context(), remote, tag("v1")); !errors.Is(err, registry.ErrUnauthorized) {
		t.Errorf("the cluster has no password: %v", err)
	}
	good, _ := BasicCredential("Basic dTpw")
	as, err := r.As(good)
	if err == nil {
		err = pull(t, as, remote, img)
	}
	if err != nil {
		t.Fatal(err)
	}
	wrong, _ := BasicCredential("Basic dTp4")
	as, err = r.As(wrong)
	if err == nil {
		_, err = as.Head(t.Context(), remote, tag("v1"))
	}
	if !errors.Is(err, registry.ErrUnauthorized) {
		t.Error(err)
	}
	if _, err := r.Head(t.Context(), remote, tag("v1")); !errors.Is(err, registry.ErrUnauthorized) {
		t.Errorf("the caller's token is the cluster's: %v", err)
	}
	mode := entry(u)
	mode.Modes = []cluster.RepositoryMode{{Repository: "secret/**", Mode: cluster.ModeCaller}}
	s := open(t, Config{Registries: []RegistryConfig{mode}, AllowAddresses: loopback})
	for value, want := range map[string]error{"Basic dTpw": nil, "Basic dTp4": registry.ErrUnauthorized, "": registry.ErrUnauthorized, "Bearer x": registry.ErrUnauthorized} {
		r, remote, _ := s.ForRequest(cluster.WithAuthorization(t.Context(), value), u.Alias+"/secret/app")
		body, _, err := r.OpenBlob(t.Context(), remote, img.Config.Digest, 0, -1)
		if !errors.Is(err, want) {
			t.Errorf("%q: %v", value, err)
		}
		if err == nil {
			body.Close()
		}
	}
	plain := script.New(t, script.Options{Basic: true, User: "u", Password: "p"})
	r, _ = only(t, entry(plain), "secret/app")
	if _, err := r.As(good); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("in clear: %v", err)
	}
	elsewhere := RegistryConfig{Registry: "registry.example", Endpoints: []Endpoint{{URL: u.URL, Access: Access{CA: u.CAFile}}}}
	r, _ = only(t, elsewhere, "secret/app")
	if _, err := r.As(good); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("to another host: %v", err)
	}
}

func TestWhereCredentialsComeFrom(t *testing.T) {
	u := script.New(t, script.Options{Basic: true, User: "u", Password: "p", TLS: true})
	u.PutImage("team/app", "v1", []byte("layer"))
	dir := t.TempDir()
	file := filepath.Join(dir, "config.json")
	helpers := filepath.Join(dir, "helpers.json")
	for path, content := range map[string]string{
		file:    fmt.Sprintf(`{"auths":{%q:{"auth":"dTpw"}}}`, u.Host),
		helpers: fmt.Sprintf(`{"credHelpers":{%q:"test"}}`, u.Host),
		filepath.Join(dir, "docker-credential-test"): "#!/bin/sh\ncat >/dev/null\necho '{\"Username\":\"u\",\"Secret\":\"p\"}'\n",
	} {
		if err := os.WriteFile(path, []byte(content), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	for name, c := range map[string]Credentials{
		"password": {Username: "u", Password: config.NewSecret("p")}, "file": {DockerConfig: file}, "helpers in a file": {DockerConfig: helpers}, "helper": {Helper: "test"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := entry(u)
			cfg.Credentials, cfg.Modes = c, everything
			r, remote := only(t, cfg, "team/app")
			if _, err := r.Head(t.Context(), remote, tag("v1")); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestConcurrency(t *testing.T) {
	u := script.New(t, script.Options{})
	d := u.PutBlob("a/b", script.Random(1, 1000)).Digest
	c := entry(u)
	c.Concurrency = 1
	r, remote := only(t, c, "a/b")
	body, _, err := r.OpenBlob(t.Context(), remote, d, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, _, err := r.OpenBlob(ctx, remote, d, 0, -1); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("a second one: %v", err)
	}
	if _, err := r.Head(t.Context(), remote, tag("v1")); !errors.Is(err, registry.ErrManifestUnknown) {
		t.Errorf("names wait for blobs: %v", err)
	}
	body.Close()
	body, _, err = r.OpenBlob(t.Context(), remote, d, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	body.Close()
}

// Who reads ahead of need takes a slot that is free, and never waits for one: it may hold what it would wait for.
func TestAheadWaitsForNoSlot(t *testing.T) {
	u := script.New(t, script.Options{})
	c := entry(u)
	c.Concurrency = 2
	d := u.PutBlob("x", []byte("some bytes")).Digest
	r, remote := only(t, c, "x")
	first, _, err := r.OpenBlob(t.Context(), remote, d, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	ahead, size, err := r.OpenBlobAhead(t.Context(), remote, d, 4, 2)
	if err != nil || size != 10 {
		t.Fatalf("with a slot free: %d bytes, %v", size, err)
	}
	if _, _, err := r.OpenBlobAhead(t.Context(), remote, d, 4, 2); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("without one: %v", err)
	}
	first.Close()
	again, _, err := r.OpenBlobAhead(t.Context(), remote, d, 0, 2)
	if err != nil {
		t.Fatalf("with one given back: %v", err)
	}
	again.Close()
	ahead.Close()
}

func TestReferrers(t *testing.T) {
	u := script.New(t, script.Options{})
	img := u.PutImage("a/b", "v1", []byte("layer"))
	sig := u.PutReferrer("a/b", img.Manifest, "application/x.signature", []byte("signed"))
	r, remote := only(t, entry(u), "a/b")
	list, err := r.Referrers(t.Context(), remote, img.Manifest.Digest)
	if err != nil || len(list) != 1 || list[0].Digest != sig.Digest || list[0].ArtifactType != sig.ArtifactType {
		t.Errorf("%+v, %v", list, err)
	}
	next := http.Header{"Link": {`</v2/app/referrers/x?last=again>; rel="next"`}}
	undo := u.Fail(script.Rule{Kind: "referrers", Header: next})
	if list, err := r.Referrers(t.Context(), remote, img.Manifest.Digest); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("a list without an end: %d referrers, %v", len(list), err)
	}
	undo()
	old := script.New(t, script.Options{NoReferrers: true})
	r, remote = only(t, entry(old), "a/b")
	if _, err := r.Referrers(t.Context(), remote, img.Manifest.Digest); !errors.Is(err, registry.ErrManifestUnknown) {
		t.Error(err)
	}
}

// The cluster's credentials are presented for repositories of mode node alone: what they may read besides is not given
// to whoever asks.
func TestCredentialsAreForModeNode(t *testing.T) {
	u := script.New(t, script.Options{Token: true, Anonymous: true, Private: []string{"secret", "team"}, User: "u", Password: "p"})
	for _, repo := range []string{"secret/app", "team/app", "open/app"} {
		u.PutImage(repo, "v1", []byte("layer"))
	}
	c := withPassword(u, "u", "p")
	c.Modes = []cluster.RepositoryMode{{Repository: "team/**", Mode: cluster.ModeNode}}
	s := open(t, Config{Registries: []RegistryConfig{c}, AllowAddresses: loopback})
	for repo, want := range map[string]error{"secret/app": registry.ErrUnauthorized, "team/app": nil, "open/app": nil} {
		r, remote, _ := s.For(u.Alias + "/" + repo)
		if _, err := r.Head(t.Context(), remote, tag("v1")); !errors.Is(err, want) {
			t.Errorf("%s: %v", repo, err)
		}
	}
}

func TestConfigMistakes(t *testing.T) {
	for name, c := range map[string]Config{
		"scheme":      {Registries: []RegistryConfig{{Registry: "https://docker.io"}}},
		"clear":       {Registries: []RegistryConfig{{Registry: "a.b", Endpoints: []Endpoint{{URL: "http://a.b"}}}}},
		"pattern":     {Registries: []RegistryConfig{{Registry: "*", Endpoints: []Endpoint{{URL: "https://a.b"}}}}},
		"mode":        {Registries: []RegistryConfig{{Registry: "a.b", Modes: []cluster.RepositoryMode{{Repository: "**", Mode: "secret"}}}}},
		"credentials": {Registries: []RegistryConfig{{Registry: "a.b", Access: Access{Credentials: Credentials{Username: "u", Password: config.NewSecret("p"), Helper: "x"}}}}},
		"half":        {Registries: []RegistryConfig{{Registry: "a.b", Access: Access{Credentials: Credentials{Username: "u"}}}}},
		"no mode":     {Registries: []RegistryConfig{{Registry: "a.b", Access: Access{Credentials: Credentials{Helper: "x"}}}}},
		"anybody's":   {Registries: []RegistryConfig{{Registry: "*", Modes: everything, Access: Access{Credentials: Credentials{Username: "u", Password: config.NewSecret("p")}}}}},
		"half a name": {Registries: []RegistryConfig{{Registry: "*corp.example", Modes: everything, Access: Access{Credentials: Credentials{Username: "u", Password: config.NewSecret("p")}}}}},
		"any domain":  {Registries: []RegistryConfig{{Registry: "registry.*", Modes: everything, Access: Access{Credentials: Credentials{Username: "u", Password: config.NewSecret("p")}}}}},
		"network":     {AllowAddresses: []string{"10.0.0.1"}},
		"helper":      {Registries: []RegistryConfig{{Registry: "a.b", Access: Access{Credentials: Credentials{Helper: "../x"}}}}},
	} {
		if err := c.Validate(); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	for _, c := range []RegistryConfig{
		{Registry: "*.corp.example", Modes: everything, Access: Access{Credentials: Credentials{Username: "u", Password: config.NewSecret("p")}}},
		{Registry: "*", Modes: everything, Access: Access{Credentials: Credentials{Helper: "x"}}},
	} {
		if err := (&Config{Registries: []RegistryConfig{c}}).Validate(); err != nil {
			t.Errorf("%s: %v", c.Registry, err)
		}
	}
}

// A password goes to no host that just anybody may have: below a suffix that registrars, or hosters, give names of.
func TestPasswordsAreOfOneDomain(t *testing.T) {
	for pattern, want := range map[string]bool{
		"docker.io": true, "*.corp.example": true, "*.corp.example:5000": true, "*.corp.co.uk": true, "*.registry.svc.cluster.local": true,
		"*.co.uk": false, "*.CO.UK": false, "*.co.uk:5000": false, "*.herokuapp.com": false, "*.github.io": false, "*.compute.amazonaws.com": false, "*.com": false, "*": false,
	} {
		if got := ofDomain(pattern); got != want {
			t.Errorf("%s is of one domain: %v, want %v", pattern, got, want)
		}
	}
}
