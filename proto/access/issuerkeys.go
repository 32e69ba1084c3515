package access

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"golang.org/x/sync/singleflight"
)

// issuerKeys are the keys of an issuer that publishes them, as they were fetched last. They are fetched again for a
// token that none of them has signed, and not more often than each keysGap, whatever tokens are shown. It implements
// oidc.KeySet and is safe for concurrent use.
type issuerKeys struct {
	http   *http.Client
	issuer string
	url    string // of the JWKS; empty: what the issuer's /.well-known/openid-configuration says

	flight singleflight.Group

	mu    sync.Mutex
	keys  []jose.JSONWebKey
	asked time.Time // when the last request began
	err   error     // of the last request
}

const (
	// issuerTimeout is how long an issuer is waited for.
	issuerTimeout = 5 * time.Second
	// keysGap is the least time between two requests to an issuer: a key that it signs with before it has been
	// published for so long may be refused.
	keysGap = 5 * time.Second
	maxJWKS = 1 << 20
)

// errNotIssuers is a token that the issuer's keys have not signed.
var errNotIssuers = errors.New("it is signed by no key of the issuer")

// VerifySignature implements oidc.KeySet: errNotIssuers for a token that the issuer has not signed, ErrIssuer where
// that is not known because its keys can't be had.
func (k *issuerKeys) VerifySignature(ctx context.Context, raw string) ([]byte, error) {
	t, err := jose.ParseSignedCompact(raw, anyAlgorithm)
	if err != nil || len(t.Signatures) != 1 {
		return nil, errNotIssuers
	}
	id := t.Signatures[0].Header.KeyID
	payload, known := k.check(t, id)
	if payload != nil {
		return payload, nil
	}
	if err := k.refresh(ctx); err != nil {
		if known {
			return nil, errNotIssuers // the key that it names is had, and has not signed it
		}
		return nil, err
	}
	if payload, _ = k.check(t, id); payload != nil {
		return payload, nil
	}
	return nil, errNotIssuers
}

// check returns what a token says that one of the keys has signed, nil for none; known, whether there is a key of this
// id.
func (k *issuerKeys) check(t *jose.JSONWebSignature, id string) (payload []byte, known bool) {
	k.mu.Lock()
	keys := k.keys
	k.mu.Unlock()
	for _, key := range keys {
		if id != "" && key.KeyID != id {
			continue
		}
		if b, err := t.Verify(key); err == nil {
			return b, true
		}
		known = id != ""
	}
	return nil, known
}

// refresh fetches the keys, unless that was done lately. It returns an ErrIssuer when they could not be had then, or
// now.
func (k *issuerKeys) refresh(ctx context.Context) error {
	_, err, _ := k.flight.Do("", func() (any, error) {
		k.mu.Lock()
		asked, err := k.asked, k.err
		k.mu.Unlock()
		if !asked.IsZero() && time.Since(asked) < keysGap {
			return nil, err
		}
		begun := time.Now()
		// Others wait for it too, and the client has a timeout of its own.
		keys, err := k.fetch(context.WithoutCancel(ctx))
		if err != nil {
			err = fmt.Errorf("%w: %w", ErrIssuer, err)
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.asked, k.err = begun, err; err == nil {
			k.keys = keys
		}
		return nil, err
	})
	return err
}

func (k *issuerKeys) fetch(ctx context.Context) ([]jose.JSONWebKey, error) {
	at := k.url
	if at == "" {
		p, err := oidc.NewProvider(oidc.ClientContext(ctx, k.http), k.issuer)
		if err != nil {
			return nil, err
		}
		var says struct {
			JWKS string `json:"jwks_uri"`
		}
		if err := p.Claims(&says); err != nil {
			return nil, fmt.Errorf("read the issuer's configuration: %w", err)
		}
		at = says.JWKS
	}
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return nil, fmt.Errorf("fetch keys: %w", err)
	}
	resp, err := k.http.Do(q)
	if err != nil {
		return nil, fmt.Errorf("fetch keys: %w", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxJWKS+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("fetch keys from %s: %w", at, err)
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("fetch keys from %s: %s", at, resp.Status)
	case len(b) > maxJWKS:
		return nil, fmt.Errorf("fetch keys from %s: more than %d bytes", at, maxJWKS)
	}
	keys, err := publicKeys(b)
	if err != nil {
		return nil, fmt.Errorf("keys from %s: %w", at, err)
	}
	return keys, nil
}

// publicKeys reads a JSON Web Key Set. Keys of kinds that are not known are left out.
func publicKeys(b []byte) (out []jose.JSONWebKey, err error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(b, &set); err != nil {
		return nil, fmt.Errorf("it is no JWKS: %w", err)
	}
	for _, raw := range set.Keys {
		var key jose.JSONWebKey
		if key.UnmarshalJSON(raw) == nil && key.Valid() && key.IsPublic() {
			out = append(out, key)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("it has no public key")
	}
	return out, nil
}

// listening is a key set that remembers its last error, which a verifier tells in words only.
type listening struct {
	oidc.KeySet
	err error
}

// VerifySignature implements oidc.KeySet.
func (l *listening) VerifySignature(ctx context.Context, raw string) (payload []byte, err error) {
	payload, l.err = l.KeySet.VerifySignature(ctx, raw)
	return payload, l.err
}
