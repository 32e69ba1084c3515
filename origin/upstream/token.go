package upstream

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"kraken/proto/registry"
)

// tokens are bearer tokens by who asked for what where, shared until shortly before they expire.
type tokens struct {
	mu    sync.Mutex
	known map[tokenKey]*token
}

// tokenKey is what a token is for.
type tokenKey struct {
	realm, service, scope string
	who                   [sha256.Size]byte // Credential.digest
}

type token struct {
	ready chan struct{} // closed when it is there
	value string
	until time.Time
	err   error
}

// Bounds of tokens.
const (
	maxTokens       = 4096
	maxTokenAnswer  = 256 << 10
	defaultTokenTTL = 60 * time.Second // of the token specification
	maxTokenTTL     = time.Hour
	tokenPatience   = 20 * time.Second
)

// get returns the token of a key, made by fetch where there is none: one request for all who ask at once.
func (ts *tokens) get(ctx context.Context, k tokenKey, fetch func(context.Context) (string, time.Duration, error)) (string, error) {
	ts.mu.Lock()
	t := ts.known[k]
	if t == nil || t.over(time.Now()) {
		t = &token{ready: make(chan struct{})}
		if ts.known == nil {
			ts.known = map[tokenKey]*token{}
		}
		ts.makeRoom(time.Now())
		ts.known[k] = t
		go ts.make(context.WithoutCancel(ctx), k, t, fetch)
	}
	ts.mu.Unlock()
	select {
	case <-t.ready:
		return t.value, t.err
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// make fetches a token within tokenPatience, and forgets it where that fails.
func (ts *tokens) make(ctx context.Context, k tokenKey, t *token, fetch func(context.Context) (string, time.Duration, error)) {
	ctx, cancel := context.WithTimeout(ctx, tokenPatience)
	defer cancel()
	value, ttl, err := fetch(ctx)
	ts.mu.Lock()
	defer ts.mu.Unlock()
	t.value, t.err, t.until = value, err, time.Now().Add(spared(ttl))
	if err != nil && ts.known[k] == t {
		delete(ts.known, k)
	}
	close(t.ready)
}

// spared returns how long a token is used that lives for ttl: until shortly before its end, so that a request that is
// on its way does not come too late.
func spared(ttl time.Duration) time.Duration {
	ttl = min(ttl, maxTokenTTL)
	return ttl - min(ttl/5, 10*time.Second)
}

// over reports whether a token that is there has expired. The caller holds ts.mu.
func (t *token) over(now time.Time) bool {
	select {
	case <-t.ready:
		return now.After(t.until)
	default:
		return false
	}
}

// makeRoom forgets tokens that have expired, and one that has not, where there are too many. The caller holds ts.mu.
func (ts *tokens) makeRoom(now time.Time) {
	if len(ts.known) < maxTokens {
		return
	}
	var any tokenKey
	for k, t := range ts.known {
		if t.over(now) {
			delete(ts.known, k)
		}
		any = k
	}
	delete(ts.known, any)
}

// drop forgets a token that was refused.
func (ts *tokens) drop(k tokenKey, value string) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if t := ts.known[k]; t != nil {
		select {
		case <-t.ready:
			if t.value == value {
				delete(ts.known, k)
			}
		default:
		}
	}
}

// errRealm is a challenge that can't be met.
var errRealm = errors.New("the registry's challenge can't be met")

// realmOf returns where a bearer challenge of a place wants a token to be got, and the key of it. A registry that is
// spoken to by TLS can't send passwords elsewhere in clear.
func realmOf(c registry.Challenge, plain bool, scope string) (*url.URL, tokenKey, error) {
	u, err := url.Parse(c.Parameters["realm"])
	switch {
	case err != nil || u.Hostname() == "" || u.User != nil || u.Opaque != "":
		return nil, tokenKey{}, fmt.Errorf("%w: realm %.100q", errRealm, c.Parameters["realm"])
	case u.Scheme != "https" && !(u.Scheme == "http" && plain):
		return nil, tokenKey{}, fmt.Errorf("%w: realm %.100q is not encrypted", errRealm, c.Parameters["realm"])
	}
	return u, tokenKey{realm: u.String(), service: c.Parameters["service"], scope: cmp.Or(scope, c.Parameters["scope"])}, nil
}

// fetchToken asks a realm for a token: by GET with the password, or by the OAuth2 form for an identity token, and where
// GET is no method of the realm's.
func fetchToken(ctx context.Context, hc *http.Client, realm *url.URL, k tokenKey, c Credential) (string, time.Duration, error) {
	if c.identity != "" {
		return postToken(ctx, hc, realm, k, url.Values{"grant_type": {"refresh_token"}, "refresh_token": {c.identity}})
	}
	u := *realm
	q := u.Query()
	if k.service != "" {
		q.Set("service", k.service)
	}
	for s := range strings.FieldsSeq(k.scope) {
		q.Add("scope", s)
	}
	if c.Username != "" {
		q.Set("account", c.Username)
	}
	u.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return "", 0, err
	}
	if c.Username != "" {
		req.Header.Set("Authorization", c.basic())
	}
	resp, err := hc.Do(req)
	if err != nil {
		return "", 0, err
	}
	if s := resp.StatusCode; c.Username != "" && (s == http.StatusNotFound || s == http.StatusMethodNotAllowed) {
		resp.Body.Close()
		return postToken(ctx, hc, realm, k, url.Values{"grant_type": {"password"}, "username": {c.Username}, "password": {c.Password}})
	}
	return readToken(resp)
}

func postToken(ctx context.Context, hc *http.Client, realm *url.URL, k tokenKey, form url.Values) (string, time.Duration, error) {
	form.Set("service", k.service)
	form.Set("scope", k.scope)
	form.Set("client_id", "kraken")
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, realm.String(), strings.NewReader(form.Encode()))
	if err != nil {
		return "", 0, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := hc.Do(req)
	if err != nil {
		return "", 0, err
	}
	return readToken(resp)
}

// realmError is a realm's refusal.
type realmError struct {
	status int
	after  time.Duration
}

func (e *realmError) Error() string {
	return fmt.Sprintf("the token service answers %d %s", e.status, http.StatusText(e.status))
}

// refuses reports whether the realm said no, rather than that it can't say now.
func (e *realmError) refuses() bool {
	return e.status == http.StatusUnauthorized || e.status == http.StatusForbidden || e.status == http.StatusBadRequest
}

// readToken reads a realm's answer and closes it.
func readToken(resp *http.Response) (string, time.Duration, error) {
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenAnswer))
	if resp.StatusCode != http.StatusOK {
		return "", 0, &realmError{resp.StatusCode, retryAfter(resp.Header, time.Now())}
	}
	if err != nil {
		return "", 0, err
	}
	return parseToken(b)
}

// parseToken reads what a token service answers.
func parseToken(b []byte) (string, time.Duration, error) {
	var a struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
		ExpiresIn   int64  `json:"expires_in"`
	}
	if err := json.Unmarshal(b, &a); err != nil {
		return "", 0, fmt.Errorf("%w: the token service's answer is not understood", errRealm)
	}
	value := cmp.Or(a.Token, a.AccessToken)
	if value == "" || strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", 0, fmt.Errorf("%w: the token service's answer has no token", errRealm)
	}
	ttl := defaultTokenTTL
	if a.ExpiresIn > 0 {
		ttl = time.Duration(min(a.ExpiresIn, int64(maxTokenTTL/time.Second))) * time.Second
	}
	return value, ttl, nil
}

// retryAfter reads Retry-After, seconds or a date; 0 where there is none.
func retryAfter(h http.Header, now time.Time) time.Duration {
	v := h.Get("Retry-After")
	if s, err := strconv.Atoi(v); err == nil {
		return time.Duration(min(max(s, 0), int(maxPause/time.Second))) * time.Second
	}
	if t, err := http.ParseTime(v); err == nil {
		return min(max(t.Sub(now), 0), maxPause)
	}
	return 0
}

// maxPause bounds how long an upstream's Retry-After is honoured.
const maxPause = 15 * time.Minute
