package login

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"kraken/proto/access"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// Paths of the token service.
const (
	TokenPath = "/token"
	JWKSPath  = "/.well-known/jwks.json"
)

// maxForm bounds the body of a token request.
const maxForm = 64 << 10

// tokenAnswer is what both kinds of token requests are answered.
type tokenAnswer struct {
	Token       string    `json:"token"`
	AccessToken string    `json:"access_token"`
	TokenType   string    `json:"token_type"`
	Scope       string    `json:"scope,omitempty"`
	ExpiresIn   int       `json:"expires_in"` // seconds
	IssuedAt    time.Time `json:"issued_at"`
}

// ServeToken is Docker's token service: GET with Basic or with nothing, and the OAuth2 POST with a password. The token
// has what the rules allow of the scopes that were asked for.
func (d *Door) ServeToken(w http.ResponseWriter, r *http.Request) {
	if err := d.serveToken(w, r); err != nil {
		registry.WriteError(w, r, err)
	}
}

func (d *Door) serveToken(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Cache-Control", "no-store")
	var scopes []string
	if r.Method == http.MethodPost {
		r.Body = http.MaxBytesReader(w, r.Body, maxForm)
		if err := r.ParseForm(); err != nil {
			return fmt.Errorf("%w: the form is not understood", errForm)
		}
		if kind := r.PostForm.Get("grant_type"); kind != "password" {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusBadRequest)
			return json.NewEncoder(w).Encode(map[string]string{"error": "unsupported_grant_type", "error_description": "want password"})
		}
		r.Header.Del("Authorization")
		r.SetBasicAuth(r.PostForm.Get("username"), r.PostForm.Get("password"))
		scopes = r.PostForm["scope"]
	} else {
		scopes = r.URL.Query()["scope"]
	}
	l, err := d.authenticate(r)
	if err == nil && l.caller.Scopes != nil {
		err = fmt.Errorf("%w: a token gives no other", errCredentials)
	}
	if errors.Is(err, errCredentials) {
		return &registry.ChallengeError{Challenges: []string{`Basic realm="` + d.cfg.Service + `"`}, Err: errCredentials}
	}
	if err != nil {
		return err
	}
	l.caller.Scopes = d.policy.Get().Grant(l.caller, access.ParseScopes(scopes))
	token, issued, err := d.signer.sign(l.caller, l.shown)
	if err != nil {
		return err
	}
	d.m.tokens.Inc()
	answer := tokenAnswer{Token: token, AccessToken: token, TokenType: "Bearer", ExpiresIn: int(time.Duration(d.cfg.TokenLifetime).Seconds()), IssuedAt: issued.UTC().Truncate(time.Second)}
	for i, s := range l.caller.Scopes {
		if i > 0 {
			answer.Scope += " "
		}
		answer.Scope += s.String()
	}
	return transport.WriteJSON(w, http.StatusOK, answer)
}

var errForm = &registry.Error{Code: "UNSUPPORTED", Status: http.StatusBadRequest, Message: "token request is not understood"}

// ServeJWKS publishes the keys that tokens are signed with.
func (d *Door) ServeJWKS(w http.ResponseWriter, _ *http.Request) {
	set := struct {
		Keys []json.RawMessage `json:"keys"`
	}{[]json.RawMessage{}}
	for _, k := range d.state.PublicKeys() {
		set.Keys = append(set.Keys, k.JWK)
	}
	transport.ServeJSON(w, http.StatusOK, set)
}
