package upstream

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"kraken/proto/registry"
	script "kraken/test/upstream"
)

func TestGuard(t *testing.T) {
	for _, c := range []struct {
		registry, dialled, to string
		ok                    bool
	}{
		{"a.b:443", "a.b:443", "93.184.216.34:443", true},
		{"a.b:443", "a.b:443", "10.1.2.3:443", true},
		{"a.b:443", "auth.a.b:443", "10.1.2.4:443", true}, // a.b is private itself
		{"c.d:443", "c.d:443", "93.184.216.34:443", true},
		{"c.d:443", "auth.c.d:443", "10.1.2.4:443", false},
		{"c.d:443", "auth.c.d:443", "100.64.0.1:443", false},
		{"c.d:443", "auth.c.d:443", "[fd12::1]:443", false},
		{"c.d:443", "auth.c.d:443", "10.9.0.7:443", true}, // allowed
		{"c.d:443", "c.d:443", "127.0.0.1:443", false},
		{"c.d:443", "c.d:443", "[::1]:443", false},
		{"c.d:443", "c.d:443", "0.0.0.0:443", false},
		{"c.d:443", "c.d:443", "[::]:443", false},
		{"c.d:443", "c.d:443", "169.254.169.254:80", false},
		{"c.d:443", "c.d:443", "[fe80::1%eth0]:80", false},
		{"c.d:443", "c.d:443", "[::ffff:169.254.169.254]:80", false},
		{"c.d:443", "c.d:443", "[64:ff9b::a9fe:a9fe]:80", false},
		{"c.d:443", "c.d:443", "[2002:7f00:1::]:80", false},
		{"c.d:443", "c.d:443", "[::127.0.0.1]:80", false},
		{"c.d:443", "c.d:443", "[fd00:ec2::254]:80", false},
		{"c.d:443", "c.d:443", "168.63.129.16:80", false},
		{"c.d:443", "c.d:443", "100.100.100.200:80", false},
		{"c.d:443", "c.d:443", "224.0.0.1:80", false},
		{"c.d:443", "c.d:443", "[64:ff9b:1::a9fe:a9fe]:80", false},
		{"c.d:443", "c.d:443", "[64:ff9b:1:7f00:0:100::]:80", false},
		{"c.d:443", "c.d:443", "[64:ff9b:1::5db8:d822]:443", true},
		{"c.d:443", "auth.c.d:443", "[64:ff9b:1::5db8:d822]:443", false},
		{"a.b:443", "auth.a.b:443", "[64:ff9b:1::5db8:d822]:443", true},
		{"c.d:443", "auth.c.d:443", "[fec0::1]:443", false},
		{"a.b:443", "auth.a.b:443", "[fec0::1]:443", true},
	} {
		g := newGuard([]netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")})
		dialers := map[string]*guardedDialer{}
		for _, own := range []string{"10.1.2.3:443", "93.184.216.34:443"} { // each registry was reached before
			name := map[string]string{"10.1.2.3:443": "a.b:443", "93.184.216.34:443": "c.d:443"}[own]
			dialers[name] = g.dialer(name)
			if err := g.check(dialers[name], name, netip.MustParseAddrPort(own)); err != nil {
				t.Fatal(err)
			}
		}
		err := g.check(dialers[c.registry], c.dialled, netip.MustParseAddrPort(c.to))
		if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrForbiddenAddress) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// Where one registry was reached opens nothing to another at the same host, and nothing that happens to that one takes
// it away: whoever may name registries of a pattern names the host of a configured endpoint, too.
func TestRegistriesAtOneHost(t *testing.T) {
	g := newGuard(nil)
	inside, realm := netip.MustParseAddrPort("10.1.2.3:443"), netip.MustParseAddrPort("10.1.2.4:443")
	configured, named := g.dialer("h.corp:443"), g.dialer("h.corp:443")
	if err := g.check(configured, "h.corp:443", inside); err != nil {
		t.Fatal(err)
	}
	if err := g.check(named, "auth.corp:443", realm); !errors.Is(err, ErrForbiddenAddress) {
		t.Errorf("what was not reached itself: %v", err)
	}
	if err := g.check(named, "h.corp:443", netip.MustParseAddrPort("93.184.216.34:443")); err != nil {
		t.Error(err)
	}
	if err := g.check(configured, "auth.corp:443", realm); err != nil {
		t.Errorf("the configured one's realm: %v", err)
	}
}

// Neither a redirect nor a realm nor a name leads to this machine, unless that is allowed; a literal endpoint is.
func TestNoWayToThisMachine(t *testing.T) {
	inside := script.New(t, script.Options{})
	u := script.New(t, script.Options{})
	u.PutImage("a/b", "v1", []byte("layer"))
	s := open(t, Config{Registries: []RegistryConfig{
		{Registry: "registry.example", Endpoints: []Endpoint{{URL: u.URL, Access: Access{PlainHTTP: true}}}},
		{Registry: "localhost:*", Access: Access{PlainHTTP: true}},
	}})
	r, remote, _ := s.For("registry.example/a/b")
	if _, err := r.Head(t.Context(), remote, tag("v1")); err != nil {
		t.Fatalf("the endpoint itself: %v", err)
	}
	for name, rule := range map[string]script.Rule{
		"redirect": {Kind: "head", Location: inside.URL + "/v2/a/b/manifests/v1"},
		"realm":    {Kind: "head", Status: http.StatusUnauthorized, Header: http.Header{"Www-Authenticate": {`Bearer realm="` + inside.URL + `/token"`}}},
	} {
		undo := u.Fail(rule)
		if _, err := r.Head(t.Context(), remote, tag("v1")); !errors.Is(err, ErrForbiddenAddress) || !errors.Is(err, registry.ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
		undo()
		r.places[0].forgive()
	}
	local, remote, ok := s.For("localhost_" + inside.Host[len("127.0.0.1:"):] + "/a/b")
	if !ok {
		t.Fatal("not mirrored")
	}
	if _, err := local.Head(t.Context(), remote, tag("v1")); !errors.Is(err, ErrForbiddenAddress) {
		t.Errorf("by name: %v", err)
	}
	if n := inside.Count("", ""); n != 0 {
		t.Errorf("%d requests came: %+v", n, inside.Requests())
	}
}

// Upstreams are reached through the environment's proxy, also one inside; what is plainly inside is not asked there.
func TestProxyOfTheEnvironment(t *testing.T) {
	u := script.New(t, script.Options{TLS: true})
	img := u.PutImage("a/b", "v1", []byte("layer"))
	var asked []string
	var mu sync.Mutex
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		asked = append(asked, r.Method+" "+r.Host)
		mu.Unlock()
		to, err := net.Dial("tcp", u.Host)
		if err != nil {
			t.Error(err)
			return
		}
		w.WriteHeader(http.StatusOK)
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		go func() {
			defer c.Close()
			io.Copy(c, to)
		}()
		io.Copy(to, rw)
		to.Close()
	}))
	t.Cleanup(proxy.Close)
	t.Setenv("HTTPS_PROXY", proxy.URL)
	t.Setenv("HTTP_PROXY", proxy.URL)
	s := open(t, Config{Registries: []RegistryConfig{
		{Registry: "example.com", Access: Access{CA: u.CAFile}}, // of whom the certificate is, too
		{Registry: "*"},
	}})
	r, remote, _ := s.For("example.com/a/b")
	if err := pull(t, r, remote, img); err != nil {
		t.Error(err)
	}
	for _, host := range []string{"169.254.169.254", "metadata.google.internal", "127.0.0.1_5000"} {
		r, remote, ok := s.For(host + "/a/b")
		if !ok {
			t.Fatal(host)
		}
		if _, err := r.Head(t.Context(), remote, tag("v1")); !errors.Is(err, registry.ErrUnavailable) {
			t.Errorf("%s: %v", host, err)
		}
	}
	s.Close()
	mu.Lock()
	defer mu.Unlock()
	if len(asked) == 0 || slices.ContainsFunc(asked, func(s string) bool { return s != "CONNECT example.com:443" }) {
		t.Errorf("the proxy was asked for %v", asked)
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add([]byte(`{"token":"x","expires_in":300}`))
	f.Add([]byte(`{"access_token":"x","expires_in":-1}`))
	f.Add([]byte(`{"token":"a\r\nb"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		value, ttl, err := parseToken(b)
		if err != nil {
			return
		}
		req, rerr := http.NewRequest(http.MethodGet, "http://a.b", nil)
		if rerr != nil {
			t.Fatal(rerr)
		}
		req.Header.Set("Authorization", "Bearer "+value)
		if spared(ttl) <= 0 || ttl > time.Hour || value == "" {
			t.Errorf("%q: %q, %s", b, value, ttl)
		}
	})
}

// Whatever a registry challenges with, a token is asked for over TLS, without a user in the URL, or not at all.
func FuzzRealm(f *testing.F) {
	for _, s := range []string{`Bearer realm="https://auth.docker.io/token",service="registry.docker.io"`, `Bearer realm="http://x"`, `Bearer realm="https://u:p@x"`, `Bearer realm="file:///etc"`, `Basic realm=x`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ch, ok := choose(registry.ParseChallenges([]string{s}), Credential{Username: "u", Password: "p"})
		if !ok || ch.Scheme != "bearer" {
			return
		}
		u, k, err := realmOf(ch, false, "repository:a/b:pull")
		if err == nil && (u.Scheme != "https" || u.User != nil || u.Hostname() == "" || k.scope != "repository:a/b:pull") {
			t.Errorf("%q: %s, %+v", s, u, k)
		}
	})
}

func FuzzContentRange(f *testing.F) {
	f.Add("bytes 0-9/10")
	f.Add("bytes 5-9/*")
	f.Fuzz(func(t *testing.T, s string) {
		first, size, err := contentRange(s)
		if err == nil && (first < 0 || size >= 0 && first >= size) {
			t.Errorf("%q: %d of %d", s, first, size)
		}
	})
}

// While one registry is made, which reads its file of roots, others are found.
func TestMakingOneRegistryHoldsNobodyUp(t *testing.T) {
	ca := script.New(t, script.Options{TLS: true}).CAFile
	s, err := Open(Config{Registries: []RegistryConfig{{Registry: "*.slow.example", Access: Access{CA: ca}}, {Registry: "*.example"}}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	roots, err := os.ReadFile(ca)
	if err = errors.Join(err, os.Remove(ca), syscall.Mkfifo(ca, 0o600)); err != nil {
		t.Fatal(err)
	}
	found := make(chan *Registry, 1)
	go func() {
		r, _, _ := s.For("a.slow.example/x")
		found <- r
	}()
	other := make(chan bool)
	go func() {
		_, _, ok := s.For("b.example/x")
		other <- ok
	}()
	select {
	case ok := <-other:
		if !ok {
			t.Error("another registry is not found")
		}
	case <-time.After(5 * time.Second):
		t.Error("another registry is waited for")
	}
	for len(found) == 0 {
		f, err := os.OpenFile(ca, os.O_WRONLY|syscall.O_NONBLOCK, 0)
		if err != nil { // nobody reads now
			time.Sleep(time.Millisecond)
			continue
		}
		_, err = f.Write(roots)
		if err = errors.Join(err, f.Close()); err != nil {
			t.Log(err)
		}
	}
	if <-found == nil {
		t.Error("the slow one is not made in the end")
	}
}
