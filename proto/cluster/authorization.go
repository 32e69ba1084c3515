package cluster

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"strings"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
)

// AuthorizationHeader is what a runtime has presented to an agent for an upstream's repository of ModeCaller, as a
// value of Authorization with scheme Basic. It is passed on between roles in a header of its own, and is not the
// sender's.
const AuthorizationHeader = "Kraken-Authorization"

type authorizationKey struct{}

// WithAuthorization returns a context whose requests to other roles carry what a runtime has presented, over TLS or
// on this machine; elsewhere it is left out.
func WithAuthorization(ctx context.Context, value string) context.Context {
	return context.WithValue(ctx, authorizationKey{}, value)
}

// Authorization returns what a runtime has presented, empty for nothing.
func Authorization(ctx context.Context) string {
	value, _ := ctx.Value(authorizationKey{}).(string)
	return value
}

// maxAuthorization bounds the bytes of what a runtime presents. Cloud registries' passwords are long.
const maxAuthorization = 16 << 10

// CarryAuthorization moves AuthorizationHeader of a request from another role to its context, for a server that asks
// upstreams, so that nothing further on sees it in a header.
func CarryAuthorization(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		value := r.Header.Get(AuthorizationHeader)
		if value == "" {
			next.ServeHTTP(w, r)
			return
		}
		r = r.Clone(r.Context())
		r.Header.Del(AuthorizationHeader)
		if len(value) <= maxAuthorization {
			r = r.WithContext(WithAuthorization(r.Context(), value))
		}
		next.ServeHTTP(w, r)
	})
}

// carry adds AuthorizationHeader to a request that nobody on the way can read.
func carry(r *http.Request) {
	value := Authorization(r.Context())
	if value == "" || r.URL == nil || r.URL.Scheme != "https" && !onThisMachine(r.URL.Host) {
		return
	}
	r.Header.Set(AuthorizationHeader, value)
}

// onThisMachine reports whether a host is a loopback address or localhost.
func onThisMachine(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	a, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return strings.EqualFold(host, "localhost") || err == nil && a.IsLoopback()
}

// Granted returns nil when an upstream's repository has a blob, and who asks may read it there: of ModeCaller what the
// context carries (WithAuthorization), as the upstream said minutes ago at most. ErrUnauthorized and ErrDenied when
// they may not, ErrBlobUnknown when the repository does not have it, ErrUnavailable when the upstream could not be
// asked.
func (c *IndexClient) Granted(ctx context.Context, repo string, d digest.Digest) error {
	_, err := c.Call(ctx, registry.Request{Method: http.MethodGet, To: about(repo, "grant", d)}, http.StatusNoContent)
	return err
}
