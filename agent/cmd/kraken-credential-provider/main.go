// Command kraken-credential-provider is a plug-in of kubelet (credentialprovider.kubelet.k8s.io/v1): it gives the token
// of the pod's service account to the registry, as the password of the user oidc. It asks nobody and keeps nothing.
package main

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

const (
	apiVersion = "credentialprovider.kubelet.k8s.io/v1"
	// user is whom a registry of this cluster takes ID tokens for.
	user = "oidc"
	// maxRequest bounds what is read.
	maxRequest = 1 << 20
	// margin is how long before its end a token is not given again, mostCached how long it is at most.
	margin     = 30 * time.Second
	mostCached = 10 * time.Minute
)

type request struct {
	APIVersion          string `json:"apiVersion"`
	Kind                string `json:"kind"`
	Image               string `json:"image"`
	ServiceAccountToken string `json:"serviceAccountToken"`
}

type response struct {
	APIVersion    string          `json:"apiVersion"`
	Kind          string          `json:"kind"`
	CacheKeyType  string          `json:"cacheKeyType"`
	CacheDuration string          `json:"cacheDuration"`
	Auth          map[string]auth `json:"auth"`
}

type auth struct {
	Username string `json:"username"`
	Password string `json:"password"`
}

func main() {
	if err := answer(os.Stdin, os.Stdout, time.Now()); err != nil {
		fmt.Fprintln(os.Stderr, "kraken-credential-provider:", err)
		os.Exit(1)
	}
}

// answer reads kubelet's request and writes the credentials for the registry of its image.
func answer(in io.Reader, out io.Writer, now time.Time) error {
	var q request
	if err := json.NewDecoder(io.LimitReader(in, maxRequest)).Decode(&q); err != nil {
		return fmt.Errorf("kubelet's request is not understood: %w", err)
	}
	if q.APIVersion != apiVersion || q.Kind != "CredentialProviderRequest" {
		return fmt.Errorf("the request is %.80q of %.80q: want CredentialProviderRequest of %s", q.Kind, q.APIVersion, apiVersion)
	}
	if q.ServiceAccountToken == "" {
		return errors.New("the request has no token: set tokenAttributes with serviceAccountTokenAudience in kubelet's CredentialProviderConfig")
	}
	registry, _, ok := strings.Cut(q.Image, "/")
	if !ok || !strings.ContainsAny(registry, ".:") && registry != "localhost" {
		return fmt.Errorf("image %.200q names no registry", q.Image)
	}
	return json.NewEncoder(out).Encode(response{
		APIVersion: apiVersion, Kind: "CredentialProviderResponse", CacheKeyType: "Registry",
		CacheDuration: cachedFor(q.ServiceAccountToken, now).String(),
		Auth:          map[string]auth{registry: {user, q.ServiceAccountToken}},
	})
}

// cachedFor returns how long kubelet may give the token again: until shortly before its end, 0 when that is not known.
func cachedFor(token string, now time.Time) time.Duration {
	var claims struct {
		Expires int64 `json:"exp"`
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return 0
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(b, &claims) != nil {
		return 0
	}
	left := time.Unix(claims.Expires, 0).Sub(now) - margin
	return max(0, min(left, mostCached)).Truncate(time.Second)
}
