package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/registry"
)

// login is a round tripper that presents a credential to one host, as that host challenges. Requests of other hosts,
// where redirects lead, pass untouched.
type login struct {
	next   http.RoundTripper
	hc     *http.Client // for realms: next without redirects
	host   *url.URL
	plain  bool // without TLS
	source *source
	tokens *tokens
	key    []byte           // of Credential.digest
	left   prometheus.Gauge // requests, as the registry says

	mu    sync.Mutex
	known registry.Challenge // the last one, so that the next request brings what is wanted
}

type scopeKey struct{}

// withScope says which repository a request reads, and as whom where that is not the cluster.
func withScope(ctx context.Context, repository string, as *Credential) context.Context {
	return context.WithValue(ctx, scopeKey{}, asking{repository, as})
}

// asking is whose request it is.
type asking struct {
	repository string
	as         *Credential
}

func (a asking) scope() string {
	if a.repository == "" {
		return ""
	}
	return "repository:" + a.repository + ":pull"
}

// RoundTrip implements http.RoundTripper.
func (l *login) RoundTrip(req *http.Request) (*http.Response, error) {
	if !strings.EqualFold(hostPort(req.URL), hostPort(l.host)) || req.URL.Scheme != l.host.Scheme {
		return l.next.RoundTrip(req)
	}
	a, _ := req.Context().Value(scopeKey{}).(asking)
	c, err := l.credential(req.Context(), a)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	known := l.known
	l.mu.Unlock()
	header, used, err := l.answer(req.Context(), known, a, c)
	if err != nil && !refused(err) {
		return nil, err
	}
	resp, err := l.send(req, header)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		return resp, err
	}
	if used != (tokenKey{}) {
		l.tokens.drop(used, strings.TrimPrefix(header, "Bearer "))
	}
	ch, ok := choose(registry.ParseChallenges(resp.Header.Values("WWW-Authenticate")), c)
	if !ok {
		return resp, nil
	}
	l.mu.Lock()
	l.known = ch
	l.mu.Unlock()
	again, _, err := l.answer(req.Context(), ch, a, c)
	switch {
	case err != nil && refused(err), err == nil && (again == "" || again == header):
		if a.as == nil {
			l.source.forget()
		}
		return resp, nil
	case err != nil:
		return nil, errors.Join(err, resp.Body.Close())
	}
	// Read to the end, so that the connection is used again.
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)); err != nil {
		return nil, errors.Join(err, resp.Body.Close())
	}
	resp.Body.Close()
	return l.send(req, again)
}

func (l *login) credential(ctx context.Context, a asking) (Credential, error) {
	if a.as != nil {
		return *a.as, nil
	}
	return l.source.get(ctx)
}

func (l *login) send(req *http.Request, authorization string) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.Header.Del("Authorization")
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := l.next.RoundTrip(req)
	if err == nil {
		// As Docker Hub says it: 76;w=21600.
		if n, err := strconv.Atoi(before(resp.Header.Get("RateLimit-Remaining"), ";")); err == nil {
			l.left.Set(float64(n))
		}
	}
	return resp, err
}

func before(s, sep string) string {
	s, _, _ = strings.Cut(s, sep)
	return s
}

// choose returns the challenge that is met: Bearer before Basic, which needs a password.
func choose(cs []registry.Challenge, c Credential) (registry.Challenge, bool) {
	for _, scheme := range []string{"bearer", "basic"} {
		for _, ch := range cs {
			if ch.Scheme == scheme && (scheme == "bearer" || c.Username != "") {
				return ch, true
			}
		}
	}
	return registry.Challenge{}, false
}

// answer returns the Authorization that meets a challenge, empty for none, and the key of the token that it is.
func (l *login) answer(ctx context.Context, ch registry.Challenge, a asking, c Credential) (string, tokenKey, error) {
	switch {
	case c.bearer != "":
		return "Bearer " + c.bearer, tokenKey{}, nil
	case ch.Scheme == "basic" && c.Username != "":
		return c.basic(), tokenKey{}, nil
	case ch.Scheme != "bearer":
		return "", tokenKey{}, nil
	}
	realm, k, err := realmOf(ch, l.plain, a.scope())
	if err != nil {
		return "", tokenKey{}, err
	}
	k.who = c.digest(l.key)
	value, err := l.tokens.get(ctx, k, func(ctx context.Context) (string, time.Duration, error) {
		return fetchToken(ctx, l.hc, realm, k, c)
	})
	if err != nil {
		return "", tokenKey{}, fmt.Errorf("log in: %w", err)
	}
	return "Bearer " + value, k, nil
}

// refused reports whether a token service said no.
func refused(err error) bool {
	var re *realmError
	return errors.As(err, &re) && re.refuses()
}
