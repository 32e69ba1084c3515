package access

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/uuid"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// Issuer is who tokens are of.
const Issuer = "kraken"

// leeway is how far the clocks of two machines may be apart.
const leeway = 30 * time.Second

// maxToken bounds a token in bytes.
const maxToken = 32 << 10

// ErrToken is a token that shows nobody: it is none, has ended, or is not signed by a key that is known.
var ErrToken = errors.New("the token is not valid")

// errUnknownKey is an ErrToken that a key signed which is not known here, or not yet.
var errUnknownKey = fmt.Errorf("%w: it is signed by a key that is not known", ErrToken)

// How a caller has shown who it is. Whoever takes a token later asks whether that still holds.
const (
	ViaPassword    = "password"
	ViaRobot       = "robot"
	ViaOIDC        = "oidc"
	ViaCertificate = "certificate"
)

// Shown is how a caller has shown who it is.
type Shown struct {
	Via string
	// Proof tells whether that still holds: of a robot its generation, of a user the fingerprint of what the password
	// was compared with. It is empty for others.
	Proof string
}

// Claims is what a token says.
type Claims struct {
	jwt.Claims
	// Access is all that the token allows; what rules say now is asked beside it.
	Access []Scope  `json:"access"`
	Groups []string `json:"groups,omitempty"`
	Via    string   `json:"via,omitempty"`
	Proof  string   `json:"proof,omitempty"` // as in Shown
}

// Caller returns who the token shows.
func (c Claims) Caller() Caller {
	scopes := c.Access
	if scopes == nil {
		scopes = []Scope{}
	}
	return Caller{Subject: c.Subject, Groups: c.Groups, Scopes: scopes}
}

// SigningKey signs tokens. Its private half never leaves the process that made it.
type SigningKey struct {
	id     string
	signer jose.Signer
	jwk    json.RawMessage // the public half
}

// NewSigningKey makes a key.
func NewSigningKey() (*SigningKey, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key for tokens: %w", err)
	}
	id := make([]byte, 12)
	rand.Read(id) // never fails
	k := &SigningKey{id: base64.RawURLEncoding.EncodeToString(id)}
	k.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: private, KeyID: k.id}}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return nil, fmt.Errorf("make a key for tokens: %w", err)
	}
	b, err := json.Marshal(jose.JSONWebKey{Key: private.Public(), KeyID: k.id, Algorithm: string(jose.ES256), Use: "sig"})
	if err != nil {
		return nil, fmt.Errorf("make a key for tokens: %w", err)
	}
	k.jwk = b
	return k, nil
}

// ID returns what tokens call the key.
func (k *SigningKey) ID() string { return k.id }

// Public returns the public half, of which no token is valid after expires.
func (k *SigningKey) Public(expires time.Time) cluster.TokenKey {
	return cluster.TokenKey{ID: k.id, JWK: k.jwk, Expires: expires.UTC().Truncate(time.Second)}
}

// Sign returns a token for a service that shows the caller, with what it may do, from now on for a while.
func (k *SigningKey) Sign(c Caller, by Shown, service string, now time.Time, lifetime time.Duration) (string, error) {
	claims := Claims{
		Claims: jwt.Claims{
			Issuer: Issuer, Subject: c.Subject, Audience: jwt.Audience{service}, ID: uuid.NewString(),
			IssuedAt: jwt.NewNumericDate(now), NotBefore: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(lifetime)),
		},
		Access: c.Scopes, Groups: c.Groups, Via: by.Via, Proof: by.Proof,
	}
	if claims.Access == nil {
		claims.Access = []Scope{}
	}
	return jwt.Signed(k.signer).Claims(claims).Serialize()
}

// Keys are public keys by id.
type Keys map[string]*ecdsa.PublicKey

// ParseKeys returns the keys that have not ended. One that can't be read is left out, and said in the error.
func ParseKeys(list []cluster.TokenKey, now time.Time) (Keys, error) {
	out := Keys{}
	var errs []error
	for _, p := range list {
		if now.After(p.Expires) {
			continue
		}
		var k jose.JSONWebKey
		if err := k.UnmarshalJSON(p.JWK); err != nil {
			errs = append(errs, fmt.Errorf("key %.40q: %w", p.ID, err))
			continue
		}
		key, ok := k.Key.(*ecdsa.PublicKey)
		if !ok || key.Curve != elliptic.P256() || k.KeyID != p.ID {
			errs = append(errs, fmt.Errorf("key %.40q is no public key for ES256", p.ID))
			continue
		}
		out[p.ID] = key
	}
	return out, errors.Join(errs...)
}

// Parse returns what a token says that one of the keys has signed for a service, an ErrToken for any other.
func (ks Keys) Parse(raw, service string, now time.Time) (Claims, error) {
	var c Claims
	if len(raw) > maxToken {
		return c, fmt.Errorf("%w: it has %d bytes", ErrToken, len(raw))
	}
	t, err := jwt.ParseSigned(raw, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil || len(t.Headers) != 1 {
		return c, fmt.Errorf("%w: it is no ES256 token", ErrToken)
	}
	key, ok := ks[t.Headers[0].KeyID]
	if !ok {
		return c, errUnknownKey
	}
	if err := t.Claims(key, &c); err != nil {
		return Claims{}, fmt.Errorf("%w: its signature is wrong", ErrToken)
	}
	want := jwt.Expected{Issuer: Issuer, AnyAudience: jwt.Audience{service}, Time: now}
	if err := c.ValidateWithLeeway(want, leeway); err != nil {
		return Claims{}, fmt.Errorf("%w: %w", ErrToken, err)
	}
	if c.Expiry == nil {
		return Claims{}, fmt.Errorf("%w: it has no end", ErrToken)
	}
	return c, nil
}

// IsOwn reports whether a token says that it is of this cluster. Nothing of it was verified.
func IsOwn(raw string) bool { return issuerOf(raw) == Issuer }

// issuerOf returns the issuer that a token names, empty for what is none. Nothing of it was verified.
func issuerOf(raw string) string {
	if len(raw) > maxToken {
		return ""
	}
	t, err := jwt.ParseSigned(raw, anyAlgorithm)
	if err != nil {
		return ""
	}
	var c jwt.Claims
	if err := t.UnsafeClaimsWithoutVerification(&c); err != nil {
		return ""
	}
	return c.Issuer
}

// anyAlgorithm are the signatures that issuers use. None is of a shared key.
var anyAlgorithm = []jose.SignatureAlgorithm{jose.ES256, jose.ES384, jose.ES512, jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.EdDSA}

// Allowed says whether the caller may do action: by the token that it shows, where it shows one, and by the rules.
// missing says that the rules allow it, and the token was not asked for it.
func (p *Policy) Allowed(c Caller, repository string, action registry.Action) (d Decision, missing bool) {
	d = p.Decide(c, repository, action)
	if d.Allowed && c.Scopes != nil && !covers(c.Scopes, repository, action) {
		return Decision{false, "the token was not given for that"}, true
	}
	return d, false
}
