package agent

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"time"

	"kraken/proto/access"
	"kraken/proto/config"
	"kraken/proto/registry"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// Access says who may pull the cluster's own repositories from this agent. Without Rules everybody on the node may pull
// all of them.
type Access struct {
	// Rules is the file that says who may do what (access.Policy), as at the proxies. It is read again when it changes.
	Rules string `yaml:"rules"`
	// Modes says for which repositories the rules are asked about whom; the first that matches decides. Default: node
	// for all.
	Modes []AccessMode `yaml:"modes"`
	// Labels are groups of this node in rules, node:<label>.
	Labels []string `yaml:"labels"`
	// Realm is the URL of the proxies' token service, which the mode caller needs.
	Realm string `yaml:"realm"`
	// Service is the name in tokens, default kraken; the same at all proxies and agents.
	Service string `yaml:"service"`
	// OIDC are the issuers whose ID tokens are taken beside the proxies' own.
	OIDC []access.IssuerConfig `yaml:"oidc"`
	// Audit is the file that gets a line of JSON for each refusal, "stdout", or empty for none. It needs no rules: what
	// upstreams refuse is in it, too.
	Audit string `yaml:"audit"`
}

// AccessMode says about whom the rules are asked.
type AccessMode struct {
	// Repositories is a pattern, as in rules, but without ${user}.
	Repositories string `yaml:"repositories"`
	// Mode is public (nobody is asked), node (what this node may pull, whoever asks here) or caller (what the token
	// allows that a request has to show).
	Mode string `yaml:"mode"`
}

const (
	modePublic = "public"
	modeNode   = "node"
	modeCaller = "caller"
)

func (c *Access) validate(m *config.Mistakes, key string) {
	if c.Service == "" {
		c.Service = "kraken"
	}
	if c.Audit != "" && c.Audit != "stdout" {
		m.Path(key+".audit", c.Audit)
	}
	if c.Rules == "" {
		if len(c.Modes) > 0 || len(c.OIDC) > 0 || c.Realm != "" {
			m.Add(key+".rules", "is needed: without rules everybody on the node may pull everything")
		}
		return
	}
	m.Path(key+".rules", c.Rules)
	if b, err := os.ReadFile(c.Rules); err != nil {
		m.Add(key+".rules", "%w", err)
	} else if _, err := access.ParsePolicy(c.Rules, b); err != nil {
		m.Add(key+".rules", "%w", err)
	}
	for i, mode := range c.Modes {
		at := fmt.Sprintf("%s.modes[%d]", key, i)
		if _, err := access.ParsePlain(mode.Repositories); err != nil {
			m.Add(at+".repositories", "%w", err)
		}
		switch mode.Mode {
		case modePublic, modeNode:
		case modeCaller:
			if c.Realm == "" {
				m.Add(key+".realm", "is needed for mode caller: where runtimes get tokens, such as https://registry.example/token")
			}
		default:
			m.Add(at+".mode", "%q: want public, node or caller", mode.Mode)
		}
	}
	access.CheckRealm(m, key+".realm", c.Realm)
	for i := range c.OIDC {
		c.OIDC[i].Validate(m, fmt.Sprintf("%s.oidc[%d]", key, i))
	}
}

// ownAccess is the registry.Access of the cluster's own repositories.
type ownAccess struct {
	cfg      Access
	log      *slog.Logger
	patterns []access.Plain // of cfg.Modes
	policy   *access.File[*access.Policy]
	issuers  *access.Issuers
	state    *access.State
	audit    *recorder
	node     access.Caller
}

// keysEvery is how often build-index is asked for the keys of tokens and for robots that were revoked.
const keysEvery = 5 * time.Second

// openAccess returns what decides about the cluster's own repositories, nil where everybody may pull them.
func (a *Agent) openAccess(c *role.Chassis) (*ownAccess, error) {
	cfg := a.cfg.Access
	if cfg.Rules == "" {
		return nil, nil
	}
	o := &ownAccess{cfg: cfg, log: a.log, audit: a.audit, node: access.Caller{Subject: access.NodePrefix + nodeName(a.cfg)}}
	for _, l := range cfg.Labels {
		o.node.Groups = append(o.node.Groups, access.NodePrefix+l)
	}
	for _, m := range cfg.Modes {
		p, err := access.ParsePlain(m.Repositories)
		if err != nil {
			return nil, fmt.Errorf("access.modes: %w", err)
		}
		o.patterns = append(o.patterns, p)
	}
	var err error
	if o.policy, err = access.OpenFile(cfg.Rules, a.log, access.ParsePolicy); err != nil {
		return nil, fmt.Errorf("access.rules: %w", err)
	}
	if o.issuers, err = access.OpenIssuers(cfg.OIDC, a.log); err != nil {
		return nil, fmt.Errorf("access: %w", err)
	}
	o.state = access.NewState(a.index.Access, keysEvery, a.log)
	c.Part("keys", o.state.Run)
	c.Health.AddCheck("access", false, func(context.Context) error { return o.policy.Err() })
	return o, nil
}

// nodeName returns the name that this node's certificate has, else the configured one.
func nodeName(cfg Config) string {
	if b, err := os.ReadFile(cfg.Client.Cert); err == nil {
		if block, _ := pem.Decode(b); block != nil {
			if c, err := x509.ParseCertificate(block.Bytes); err == nil {
				if p, err := transport.PrincipalOf(c); err == nil {
					return p.ID
				}
			}
		}
	}
	if cfg.Node != "" {
		return cfg.Node
	}
	name, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return name
}

func (o *ownAccess) mode(repository string) string {
	for i, p := range o.patterns {
		if p.Matches(repository) {
			return o.cfg.Modes[i].Mode
		}
	}
	return modeNode
}

// Allow implements registry.Access. Who enters is asked nothing: runtimes take a 401 there for a broken mirror.
func (o *ownAccess) Allow(r *http.Request, repository string, action registry.Action) (context.Context, error) {
	ctx := r.Context()
	caller, err := o.authenticate(r)
	if action == registry.ActionEnter || action == registry.ActionCatalog {
		return access.WithCaller(ctx, caller), nil
	}
	switch o.mode(repository) {
	case modePublic:
		return access.WithCaller(ctx, caller), nil
	case modeNode:
		d := o.policy.Get().Decide(o.node, repository, action)
		if !d.Allowed {
			o.log.Info("a pull was refused", "repository", repository, "subject", o.node.Subject, "reason", d.Why)
			o.audit.refuse(r, o.node.String(), repository, action, http.StatusForbidden, d.Why)
			return nil, fmt.Errorf("%w: %s may not %s in %s", registry.ErrDenied, o.node, action, repository)
		}
		return access.WithCaller(ctx, caller), nil
	}
	challenge := func(kind string) error {
		return &registry.ChallengeError{Challenges: []string{access.Challenge(o.cfg.Realm, o.cfg.Service, repository, action, kind)}}
	}
	switch {
	case errors.Is(err, access.ErrToken):
		o.audit.loginFailed(r, repository, err)
		return nil, challenge("invalid_token")
	case err != nil:
		return nil, err
	}
	d, missing := o.policy.Get().Allowed(caller, repository, action)
	switch {
	case d.Allowed:
		return access.WithCaller(ctx, caller), nil
	case missing:
		return nil, challenge("insufficient_scope")
	case !caller.Known():
		if caller.Scopes != nil { // a token of the service, that everybody gets
			o.audit.refuse(r, caller.String(), repository, action, http.StatusUnauthorized, d.Why)
		}
		return nil, challenge("")
	}
	o.log.Info("a pull was refused", "repository", repository, "subject", caller.Subject, "reason", d.Why)
	o.audit.refuse(r, caller.String(), repository, action, http.StatusForbidden, d.Why)
	return nil, fmt.Errorf("%w: %s may not %s in %s", registry.ErrDenied, caller, action, repository)
}

// May implements registry.Viewer: lists show what the node may pull, and the caller.
func (o *ownAccess) May(ctx context.Context, repository string, action registry.Action) bool {
	switch o.mode(repository) {
	case modePublic:
		return true
	case modeNode:
		return o.policy.Get().Decide(o.node, repository, action).Allowed
	}
	caller := access.CallerOf(ctx)
	d, missing := o.policy.Get().Allowed(caller, repository, action)
	return d.Allowed || missing && caller.HasCatalog()
}

// bearerOf returns the bearer token of a request, empty for none.
func bearerOf(r *http.Request) string {
	scheme, raw, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "bearer") {
		return ""
	}
	return strings.TrimSpace(raw)
}

// authenticate returns who makes a request: by a token of the proxies' service or of an issuer, as a bearer or as the
// password of the user oidc. Other passwords are the proxies' matter, and an access.ErrToken here.
func (o *ownAccess) authenticate(r *http.Request) (access.Caller, error) {
	scheme, raw, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	switch strings.ToLower(scheme) {
	case "":
		return access.Caller{}, nil
	case "basic":
		user, password, ok := r.BasicAuth()
		if !ok || user != access.UserOIDC {
			return access.Caller{}, fmt.Errorf("%w: an agent takes tokens only", access.ErrToken)
		}
		raw = password
	case "bearer":
	default:
		return access.Caller{}, fmt.Errorf("%w: the scheme is neither Basic nor Bearer", access.ErrToken)
	}
	if raw = strings.TrimSpace(raw); access.IsOwn(raw) {
		c, err := o.state.Parse(r.Context(), raw, o.cfg.Service)
		if err != nil {
			return access.Caller{}, err
		}
		return c.Caller(), nil
	}
	c, err := o.issuers.Verify(r.Context(), raw)
	if errors.Is(err, access.ErrIssuer) {
		err = fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
	}
	return c, err
}

// accessOf returns what decides about all repositories that the agent serves.
func (a *Agent) accessOf() registry.Access {
	if a.door == nil {
		return callers{a}
	}
	return ofKind{a, a.door, callers{a}}
}

// ofKind asks one access for the cluster's own repositories, and another for upstreams'.
type ofKind struct {
	a              *Agent
	own, upstreams interface {
		registry.Access
		registry.Viewer
	}
}

// Allow implements registry.Access.
func (k ofKind) Allow(r *http.Request, repository string, action registry.Action) (context.Context, error) {
	if k.a.isUpstreams(repository) {
		return k.upstreams.Allow(r, repository, action)
	}
	return k.own.Allow(r, repository, action)
}

// May implements registry.Viewer. A name that may be an upstream's is no rule's matter before that is known.
func (k ofKind) May(ctx context.Context, repository string, action registry.Action) bool {
	if k.a.isUpstreams(repository) || k.a.namer.MayBePrivate(repository) {
		return k.upstreams.May(ctx, repository, action)
	}
	return k.own.May(ctx, repository, action)
}
