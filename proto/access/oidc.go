package access

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"

	"github.com/coreos/go-oidc/v3/oidc"

	"kraken/proto/config"
)

// IssuerConfig is one issuer of OIDC ID tokens, such as GitHub Actions, GitLab, or the service accounts of Kubernetes.
type IssuerConfig struct {
	// Name is what its subjects and groups begin with in rules: <name>:<subject>.
	Name string `yaml:"name"`
	// Issuer is the URL that its tokens name.
	Issuer string `yaml:"issuer"`
	// Audience is whom its tokens must be made for: a word of this cluster's own.
	Audience string `yaml:"audience"`
	// SubjectClaim is the claim that names the caller, default sub.
	SubjectClaim string `yaml:"subject_claim"`
	// GroupsClaim is the claim with the caller's groups, a list or one text. Default none.
	GroupsClaim string `yaml:"groups_claim"`
	// Require are claims that tokens must have. Public issuers need one: anybody can have a token of theirs, for any
	// audience.
	Require []RequiredClaim `yaml:"require"`
	// Users makes subjects of this issuer users, like those of htpasswd, without <name>: before them. For the one
	// issuer of a company, whose names nobody else can have.
	Users bool `yaml:"users"`
	// Keys is a file with the issuer's JWKS, for one that can't be reached from here; or KeysURL is where they are.
	// Default: what the issuer's /.well-known/openid-configuration says.
	Keys    string `yaml:"keys"`
	KeysURL string `yaml:"keys_url"`
	// CA is a file with the authority of the issuer's certificate, default the system's.
	CA string `yaml:"ca"`
}

// RequiredClaim is a claim with a value that it must have.
type RequiredClaim struct {
	Claim string `yaml:"claim"`
	Value string `yaml:"value"`
}

// Validate puts what is wrong into m, under key.
func (c *IssuerConfig) Validate(m *config.Mistakes, key string) {
	switch {
	case !elementGrammar.MatchString(c.Name):
		m.Add(key+".name", "%q: want a name of lower case letters and digits, which rules write before a colon", c.Name)
	case slices.Contains([]string{"cert", "node"}, c.Name):
		m.Add(key+".name", "%q stands for other callers", c.Name)
	}
	m.Need(key+".issuer", c.Issuer)
	checkURL(m, key+".issuer", c.Issuer, "the URL that the issuer's tokens name, such as https://token.actions.githubusercontent.com")
	if c.Issuer == Issuer {
		m.Add(key+".issuer", "%q is this cluster itself", c.Issuer)
	}
	m.Need(key+".audience", c.Audience)
	for i, r := range c.Require {
		m.Need(fmt.Sprintf("%s.require[%d].claim", key, i), r.Claim)
	}
	if c.Keys != "" && c.KeysURL != "" {
		m.Add(key+".keys_url", "and keys exclude each other: set one")
	}
	if c.Keys != "" {
		m.File(key+".keys", c.Keys)
	}
	checkURL(m, key+".keys_url", c.KeysURL, "where the issuer's JWKS is")
	if c.CA != "" {
		m.File(key+".ca", c.CA)
	}
}

// Issuers verifies ID tokens. It is safe for concurrent use.
type Issuers struct{ all []*issuer }

// issuer has its keys from a file, or fetches them.
type issuer struct {
	cfg  IssuerConfig
	file *File[[]crypto.PublicKey]
	keys *issuerKeys
}

// OpenIssuers reads the files of the configuration. It touches no network.
func OpenIssuers(cfg []IssuerConfig, log *slog.Logger) (*Issuers, error) {
	out := &Issuers{}
	for i, c := range cfg {
		hc := &http.Client{Timeout: issuerTimeout}
		is := &issuer{cfg: c, keys: &issuerKeys{http: hc, issuer: c.Issuer, url: c.KeysURL}}
		if c.CA != "" {
			pem, err := os.ReadFile(c.CA)
			if err != nil {
				return nil, fmt.Errorf("oidc[%d].ca: %w", i, err)
			}
			pool := x509.NewCertPool()
			if !pool.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("oidc[%d].ca: no certificate in PEM form is in %s", i, c.CA)
			}
			t := http.DefaultTransport.(*http.Transport).Clone()
			t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
			hc.Transport = t
		}
		if c.Keys != "" {
			f, err := OpenFile(c.Keys, log, parseJWKS)
			if err != nil {
				return nil, fmt.Errorf("oidc[%d].keys: %w", i, err)
			}
			is.file = f
		}
		out.all = append(out.all, is)
	}
	return out, nil
}

// parseJWKS reads a file with a JSON Web Key Set.
func parseJWKS(name string, b []byte) (out []crypto.PublicKey, err error) {
	keys, err := publicKeys(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	for _, k := range keys {
		out = append(out, k.Key)
	}
	return out, nil
}

// ErrIssuer is an issuer whose keys can't be had now.
var ErrIssuer = errors.New("the issuer's keys can't be had now")

// Verify returns who an ID token shows. An ErrToken for one that shows nobody, ErrIssuer where that is not known now.
func (s *Issuers) Verify(ctx context.Context, raw string) (Caller, error) {
	name := issuerOf(raw)
	var last error
	for _, is := range s.all {
		if name == "" || is.cfg.Issuer != name {
			continue
		}
		c, err := is.verify(ctx, raw) // several entries may be of one issuer, with other audiences
		if err == nil {
			return c, nil
		}
		if last == nil || errors.Is(err, ErrIssuer) {
			last = err
		}
	}
	if last == nil {
		return Caller{}, fmt.Errorf("%w: it is of no issuer that is configured", ErrToken)
	}
	return Caller{}, last
}

func (is *issuer) verify(ctx context.Context, raw string) (Caller, error) {
	l := &listening{KeySet: is.keys}
	if is.file != nil {
		l.KeySet = &oidc.StaticKeySet{PublicKeys: is.file.Get()}
	}
	cfg := &oidc.Config{ClientID: is.cfg.Audience, SupportedSigningAlgs: algorithmNames()}
	t, err := oidc.NewVerifier(is.cfg.Issuer, l, cfg).Verify(ctx, raw)
	if errors.Is(l.err, ErrIssuer) {
		return Caller{}, fmt.Errorf("issuer %s: %w", is.cfg.Name, l.err)
	}
	if err != nil {
		return Caller{}, fmt.Errorf("%w: %w", ErrToken, err)
	}
	var claims map[string]any
	if err := t.Claims(&claims); err != nil {
		return Caller{}, fmt.Errorf("%w: %w", ErrToken, err)
	}
	for _, r := range is.cfg.Require {
		if got := fmt.Sprint(claims[r.Claim]); got != r.Value {
			return Caller{}, fmt.Errorf("%w: its claim %s is not %q", ErrToken, r.Claim, r.Value)
		}
	}
	subject := t.Subject
	if is.cfg.SubjectClaim != "" {
		subject, _ = claims[is.cfg.SubjectClaim].(string)
	}
	if subject == "" {
		return Caller{}, fmt.Errorf("%w: it names no subject", ErrToken)
	}
	return is.caller(subject, claims[is.cfg.GroupsClaim])
}

// caller spells a subject and its groups as rules do.
func (is *issuer) caller(subject string, groups any) (Caller, error) {
	c := Caller{Subject: is.cfg.Name + ":" + subject}
	if is.cfg.Users {
		if err := CheckUser(subject); err != nil {
			return Caller{}, fmt.Errorf("%w: %w", ErrToken, err)
		}
		c.Subject = subject
	}
	switch g := groups.(type) {
	case string:
		c.Groups = []string{is.cfg.Name + ":" + g}
	case []any:
		for _, v := range g {
			if s, ok := v.(string); ok && len(c.Groups) < maxGroups {
				c.Groups = append(c.Groups, is.cfg.Name+":"+s)
			}
		}
	}
	return c, nil
}

const maxGroups = 200

func algorithmNames() (out []string) {
	for _, a := range anyAlgorithm {
		out = append(out, string(a))
	}
	return out
}
