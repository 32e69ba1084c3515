package agent

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/jellydator/ttlcache/v3"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// Of an upstream's repository of mode caller a runtime gets what the upstream gives to the runtime's own credentials,
// the pod's imagePullSecret. The agent asks for them by a 401, passes what comes on to build-index, which asks the
// upstream, and keeps nothing but that it was granted. Whoever shows none is told 401, and asks the upstream itself.

const (
	// grantedFor is how long a grant of build-index counts here without asking again.
	grantedFor = time.Minute
	// tokenFor is how long what the agent's realm gives out can be used.
	tokenFor = 5 * time.Minute
	// knownGrants bounds the grants that are remembered.
	knownGrants = 10_000
	// maxCredential bounds what a runtime presents, in bytes.
	maxCredential = 16 << 10
)

// mode returns who may read a repository.
func (a *Agent) mode(repo string) cluster.Mode {
	return a.namer.Upstreams().ModeOf(repo)
}

// callers is the registry.Access of an agent: it asks for credentials where they are needed, and puts what comes into
// the request's context. Whether they suffice the upstream says.
type callers struct{ a *Agent }

// Allow implements registry.Access.
func (c callers) Allow(r *http.Request, repo string, action registry.Action) (context.Context, error) {
	if repo == "" || c.a.mode(repo) != cluster.ModeCaller {
		return r.Context(), nil
	}
	scheme, value, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	basic := ""
	switch strings.ToLower(scheme) {
	case "basic":
		basic = strings.TrimSpace(value)
	case "bearer":
		basic = c.a.tokens.open(strings.TrimSpace(value))
	}
	if basic != "" && len(basic) <= maxCredential {
		noteAsked(r.Context(), repo, basic)
		return cluster.WithAuthorization(r.Context(), "Basic "+basic), nil
	}
	if !readByNobody(r) {
		// Secrets are not asked for where others can read them: the runtime goes on to the upstream.
		return nil, fmt.Errorf("%w: %s is read with credentials, for which this listener needs TLS", registry.ErrUnauthorized, repo)
	}
	return nil, &registry.ChallengeError{Challenges: []string{
		fmt.Sprintf(`Bearer realm="%s/token",service="%s",scope="repository:%s:pull"`, baseOf(r), r.Host, repo),
		fmt.Sprintf(`Basic realm="%s"`, r.Host),
	}}
}

// May implements registry.Viewer: lists show what is surely not private. Of the rest the upstream says who may know it,
// and it is asked about no list.
func (c callers) May(_ context.Context, repo string, _ registry.Action) bool {
	return !c.a.namer.MayBePrivate(repo)
}

// readByNobody reports whether what the client sends can be read by nobody else: it is on this machine, or encrypted.
func readByNobody(r *http.Request) bool {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	ip, perr := netip.ParseAddr(host)
	return r.TLS != nil || err == nil && perr == nil && ip.Unmap().IsLoopback()
}

func baseOf(r *http.Request) string {
	if r.TLS != nil {
		return "https://" + r.Host
	}
	return "http://" + r.Host
}

// tokens are what the agent's realm gives out: credentials that only this process can open, so that it need not keep
// any.
type tokens struct{ aead cipher.AEAD }

func newTokens() (*tokens, error) {
	var key [32]byte
	rand.Read(key[:]) // never fails
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	return &tokens{aead}, err
}

// sealed is what is in a token.
type sealed struct {
	Basic   string `json:"b"`
	Expires int64  `json:"e"` // seconds since the epoch
}

// seal returns a token for the value of a Basic authorization.
func (t *tokens) seal(basic string) (string, error) {
	b, err := json.Marshal(sealed{basic, time.Now().Add(tokenFor).Unix()})
	if err != nil {
		return "", err
	}
	nonce := make([]byte, t.aead.NonceSize(), t.aead.NonceSize()+len(b)+t.aead.Overhead())
	rand.Read(nonce) // never fails
	return base64.RawURLEncoding.EncodeToString(t.aead.Seal(nonce, nonce, b, nil)), nil
}

// open returns what was sealed, empty for what was not, or has expired.
func (t *tokens) open(token string) string {
	b, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil || len(b) < t.aead.NonceSize() {
		return ""
	}
	plain, err := t.aead.Open(nil, b[:t.aead.NonceSize()], b[t.aead.NonceSize():], nil)
	var s sealed
	if err != nil || json.Unmarshal(plain, &s) != nil || time.Now().Unix() > s.Expires {
		return ""
	}
	return s.Basic
}

// token is the agent's realm: OAuth2's password grant by POST, as containerd sends it, and Docker's GET with Basic. It
// believes nobody: what it gives out is what it was given, sealed.
func (a *Agent) token(w http.ResponseWriter, r *http.Request) {
	if !readByNobody(r) {
		registry.WriteError(w, r, fmt.Errorf("%w: this listener needs TLS", registry.ErrDenied))
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, 2*maxCredential)
	user, password, ok := r.BasicAuth()
	if r.Method == http.MethodPost {
		if err := r.ParseForm(); err != nil {
			registry.WriteError(w, r, fmt.Errorf("%w: the form can't be read", registry.ErrUnauthorized))
			return
		}
		if r.PostForm.Get("grant_type") == "password" {
			user, password, ok = r.PostForm.Get("username"), r.PostForm.Get("password"), true
		}
	}
	if !ok || password == "" || len(user)+len(password) > maxCredential/2 || strings.Contains(user, ":") {
		registry.WriteError(w, r, &registry.ChallengeError{Challenges: []string{fmt.Sprintf(`Basic realm="%s"`, r.Host)}})
		return
	}
	sealed, err := a.tokens.seal(base64.StdEncoding.EncodeToString([]byte(user + ":" + password)))
	if err != nil {
		registry.WriteError(w, r, err)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	transport.ServeJSON(w, http.StatusOK, map[string]any{
		"token": sealed, "access_token": sealed, "expires_in": int(tokenFor / time.Second), "issued_at": time.Now().UTC().Format(time.RFC3339),
	})
}

// callerOf is part of the keys of what is remembered for a repository: empty for all who need no credentials there,
// else a hash of what the caller presented.
func (a *Agent) callerOf(ctx context.Context, repo string) string {
	if a.mode(repo) != cluster.ModeCaller {
		return ""
	}
	sum := sha256.Sum256(append(a.callerKey[:], cluster.Authorization(ctx)...))
	return "\x00" + hex.EncodeToString(sum[:])
}

// noteGrant remembers that build-index gave a caller a manifest.
func (a *Agent) noteGrant(ctx context.Context, repo string) {
	if caller := a.callerOf(ctx, repo); caller != "" {
		a.granted.Set(repo+caller, struct{}{}, ttlcache.DefaultTTL)
	}
}

// mayReadStale returns nil when the caller may read a repository about which build-index can't be asked now: who was
// granted it a moment ago, and everybody where it is surely not private.
func (a *Agent) mayReadStale(ctx context.Context, repo string) error {
	if !a.namer.MayBePrivate(repo) {
		return nil
	}
	if caller := a.callerOf(ctx, repo); caller == "" || !a.granted.Has(repo+caller) {
		return fmt.Errorf("%w: %s may be private, and whether the caller may read it can't be asked", registry.ErrUnavailable, repo)
	}
	return nil
}
