package access

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// issuing is an issuer with keys, of which it publishes some; it is the transport of its clients.
type issuing struct {
	t       *testing.T
	keys    map[string]*ecdsa.PrivateKey
	public  []string // ids
	away    bool
	fetched int // how often its keys were
}

const issuerURL = "https://issuer.test"

func (i *issuing) RoundTrip(r *http.Request) (*http.Response, error) {
	if i.away {
		return nil, errors.New("no route to host")
	}
	answer := any(map[string]string{"issuer": issuerURL, "jwks_uri": issuerURL + "/keys"})
	if r.URL.Path == "/keys" {
		i.fetched++
		set := jose.JSONWebKeySet{}
		for _, id := range i.public {
			set.Keys = append(set.Keys, jose.JSONWebKey{Key: i.key(id).Public(), KeyID: id, Algorithm: "ES256", Use: "sig"})
		}
		answer = set
	}
	b, err := json.Marshal(answer)
	if err != nil {
		return nil, err
	}
	return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(bytes.NewReader(b)), Request: r}, nil
}

func (i *issuing) key(id string) *ecdsa.PrivateKey {
	k := i.keys[id]
	if k == nil {
		var err error
		if k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			i.t.Fatal(err)
		}
		i.keys[id] = k
	}
	return k
}

// token is one that names the key id and is signed by the key by.
func (i *issuing) token(id, by string) string {
	i.t.Helper()
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: i.key(by), KeyID: id}}, nil)
	if err != nil {
		i.t.Fatal(err)
	}
	raw, err := jwt.Signed(s).Claims(map[string]any{"iss": issuerURL, "aud": "kraken", "sub": "job", "exp": time.Now().Add(time.Hour).Unix()}).Serialize()
	if err != nil {
		i.t.Fatal(err)
	}
	return raw
}

func newIssuing(t *testing.T, cfg IssuerConfig) (*issuing, *Issuers) {
	i := &issuing{t: t, keys: map[string]*ecdsa.PrivateKey{}, public: []string{"k1"}}
	cfg.Name, cfg.Issuer, cfg.Audience = "ci", issuerURL, "kraken"
	all, err := OpenIssuers([]IssuerConfig{cfg}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	all.all[0].keys.http.Transport = i
	return i, all
}

// A token that the issuer has not signed is told from an issuer that can't be asked, which is asked again in a while;
// what strangers show makes nobody ask it more often.
func TestIssuerKeys(t *testing.T) {
	for name, cfg := range map[string]IssuerConfig{"its configuration": {}, "a URL of keys": {KeysURL: issuerURL + "/keys"}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { issuerKeysOf(t, cfg) })
		})
	}
}

func issuerKeysOf(t *testing.T, cfg IssuerConfig) {
	i, all := newIssuing(t, cfg)
	want := func(what, raw string, want error) {
		t.Helper()
		c, err := all.Verify(t.Context(), raw)
		if want == nil && (err != nil || c.Subject != "ci:job") || want != nil && !errors.Is(err, want) || errors.Is(err, ErrToken) && errors.Is(err, ErrIssuer) {
			t.Errorf("%s: %v, %v, want %v", what, c, err, want)
		}
	}
	i.away = true
	want("the issuer is away", i.token("k1", "k1"), ErrIssuer)
	i.away = false
	want("right after it was away", i.token("k1", "k1"), ErrIssuer)
	time.Sleep(keysGap)
	want("it is back", i.token("k1", "k1"), nil)
	for n := range 100 {
		want("a key that is none", i.token(fmt.Sprint("none", n), "evil"), ErrToken)
		want("a key that has not signed", i.token("k1", "evil"), ErrToken)
		want("a key of no name", i.token("", "evil"), ErrToken)
		want("an honest one", i.token("k1", "k1"), nil)
		want("an honest one that names no key", i.token("", "k1"), nil)
	}
	if i.fetched != 1 {
		t.Errorf("the keys were fetched %d times in a moment", i.fetched)
	}
	i.public = []string{"k2"}
	time.Sleep(keysGap)
	want("a new key", i.token("k2", "k2"), nil)
	want("the one before", i.token("k1", "k1"), ErrToken)
	time.Sleep(keysGap)
	i.away = true
	want("a key that is none, with the issuer away", i.token("none", "evil"), ErrIssuer)
	want("a key that is had and has not signed", i.token("k2", "evil"), ErrToken)
	want("a key that is had", i.token("k2", "k2"), nil)
}
