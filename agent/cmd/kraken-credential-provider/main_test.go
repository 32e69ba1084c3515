package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

func tokenUntil(exp int64) string {
	return "eyJhbGciOiJub25lIn0." + base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"exp":%d}`, exp)) + ".c2ln"
}

// The registry of the image gets the token, for as long as it lasts.
func TestAnswer(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for _, c := range []struct {
		image    string
		exp      int64
		registry string
		cached   string
	}{
		{"registry.example/team/app:1", 3600, "registry.example", "10m0s"},
		{"registry.example:5000/app@sha256:00", 90, "registry.example:5000", "1m0s"},
		{"localhost/app", 10, "localhost", "0s"},
	} {
		token := tokenUntil(now.Unix() + c.exp)
		var out bytes.Buffer
		q := fmt.Sprintf(`{"apiVersion":%q,"kind":"CredentialProviderRequest","image":%q,"serviceAccountToken":%q}`, apiVersion, c.image, token)
		if err := answer(strings.NewReader(q), &out, now); err != nil {
			t.Error(err)
			continue
		}
		var got response
		if err := json.Unmarshal(out.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		if got.Kind != "CredentialProviderResponse" || got.Auth[c.registry] != (auth{user, token}) || got.CacheDuration != c.cached || got.CacheKeyType != "Registry" {
			t.Errorf("%s: %s", c.image, out.String())
		}
	}
}

// What can't be answered is an error that does not show the token.
func TestAnswerRefuses(t *testing.T) {
	for q, want := range map[string]string{
		"": "not understood",
		`{"apiVersion":"v0","kind":"CredentialProviderRequest"}`:                                                            apiVersion,
		`{"apiVersion":"` + apiVersion + `","kind":"CredentialProviderRequest","image":"a.b/c"}`:                            "tokenAttributes",
		`{"apiVersion":"` + apiVersion + `","kind":"CredentialProviderRequest","image":"nginx","serviceAccountToken":"s3"}`: "names no registry",
	} {
		var out bytes.Buffer
		err := answer(strings.NewReader(q), &out, time.Now())
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3") || out.Len() > 0 {
			t.Errorf("%s: %v, %s", q, err, out.String())
		}
	}
	if d := cachedFor("opaque", time.Now()); d != 0 {
		t.Errorf("an opaque token is cached for %s", d)
	}
}
