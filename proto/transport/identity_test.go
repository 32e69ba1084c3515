package transport

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

func TestParsePrincipal(t *testing.T) {
	for _, c := range []struct {
		uri  string
		want Principal // zero: refused
	}{
		{"kraken://prod/agent/node-17.example", Principal{"prod", RoleAgent, "node-17.example"}},
		{"kraken://a.b-c/build-index/Build_Index.01", Principal{"a.b-c", RoleBuildIndex, "Build_Index.01"}},
		{"kraken://prod/warden/x", Principal{"prod", "warden", "x"}}, // of a version to come: it may do nothing
		{uri: ""},
		{uri: "kraken://"},
		{uri: "kraken:///agent/x"},
		{uri: "kraken://prod/agent"},
		{uri: "kraken://prod/agent/"},
		{uri: "kraken://prod/agent/x/"},
		{uri: "kraken://prod/agent/x/y"},
		{uri: "kraken://prod//x"},
		{uri: "kraken://prod/agent/.."},
		{uri: "kraken://prod/agent/x?y"},
		{uri: "kraken://prod/agent/x#y"},
		{uri: "kraken://prod/agent/%78"},
		{uri: "kraken://prod:1/agent/x"},
		{uri: "kraken://u@prod/agent/x"},
		{uri: "kraken://Prod/agent/x"},
		{uri: "kraken://prod/Agent/x"},
		{uri: "KRAKEN://prod/agent/x"},
		{uri: "spiffe://prod/agent/x"},
		{uri: "kraken://prod/agent/x\n"},
		{uri: "kraken://prod/agent/" + strings.Repeat("x", 254)},
		{uri: "kraken://" + strings.Repeat("x", 64) + "/agent/x"},
	} {
		got, err := ParsePrincipal(c.uri)
		if got != c.want || (err == nil) != (c.want != Principal{}) {
			t.Errorf("%q: %+v, %v", c.uri, got, err)
		}
		if err == nil && got.String() != c.uri {
			t.Errorf("%q is written %q", c.uri, got)
		}
	}
}

func TestIdentityOfRequest(t *testing.T) {
	parse := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	one, two := parse("kraken://prod/agent/a"), parse("kraken://prod/proxy/p")
	for name, c := range map[string]struct {
		uris []*url.URL
		want Principal
		none bool
	}{
		"one":              {uris: []*url.URL{one}, want: Principal{"prod", RoleAgent, "a"}},
		"one beside other": {uris: []*url.URL{parse("spiffe://prod/ns/x"), one}, want: Principal{"prod", RoleAgent, "a"}},
		"two":              {uris: []*url.URL{one, two}},
		"none":             {none: true},
		"no identity":      {uris: []*url.URL{parse("kraken://prod/agent")}},
		"opaque":           {uris: []*url.URL{parse("kraken:prod/agent/a")}},
		"upper case":       {uris: []*url.URL{parse("KRAKEN://prod/agent/a"), two}},
	} {
		cert := &x509.Certificate{URIs: c.uris}
		got, err := PrincipalOf(cert)
		if got != c.want || (err == nil) != (c.want != Principal{}) || errors.Is(err, ErrNoIdentity) != c.none {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		r := httptest.NewRequest("GET", "/", nil)
		if p, ok := Identity(r); ok {
			t.Errorf("plain HTTP has an identity: %v", p)
		}
		r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}
		if p, ok := Identity(r); ok {
			t.Errorf("%s: a certificate that nobody verified has an identity: %v", name, p)
		}
		r.TLS.VerifiedChains = [][]*x509.Certificate{{cert}}
		if p, ok := Identity(r); p != c.want || ok != (c.want != Principal{}) {
			t.Errorf("%s: of the request: %v, %v", name, p, ok)
		}
	}
}

func FuzzParsePrincipal(f *testing.F) {
	for _, s := range []string{"kraken://prod/agent/node-17", "kraken://a.b/build-index/B_1", "kraken://prod/agent/../x", "KRAKEN://p/a/x", "kraken://p/a/%2e"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParsePrincipal(s)
		if err != nil {
			if p != (Principal{}) {
				t.Errorf("%q: an error and %+v", s, p)
			}
			return
		}
		if p.String() != s {
			t.Errorf("%q is written %q", s, p)
		}
		u, err := url.Parse(s)
		if err != nil || u.Host != p.Cluster || u.Path != "/"+string(p.Role)+"/"+p.ID || u.String() != s {
			t.Errorf("%q is another URL: %v, %v", s, u, err)
		}
	})
}
