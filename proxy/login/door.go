package login

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"kraken/proto/access"
	"kraken/proto/audit"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// Index is what the door needs of build-index.
type Index interface {
	Access(ctx context.Context, have cluster.AccessState) (cluster.AccessState, error)
	PutTokenKey(ctx context.Context, k cluster.TokenKey) error
}

// Door is the registry.Access of a proxy. It is safe for concurrent use.
type Door struct {
	cfg       Config
	log       *slog.Logger
	policy    *access.File[*access.Policy]
	passwords *passwords
	issuers   *access.Issuers
	state     *access.State
	signer    *signer
	throttle  *throttle
	audit     *audit.Log
	m         *metrics
}

// heardEvery is how often build-index is asked for keys and robots: what is revoked ends within this time.
const heardEvery = 2 * time.Second

// Open reads the files of a valid configuration. RunState and RunSigner are to run while the door is used, Close ends
// its use.
func Open(cfg Config, index Index, log *slog.Logger, reg registerer) (*Door, error) {
	d := &Door{cfg: cfg, log: log, throttle: newThrottle(maxBuckets), m: newMetrics(reg)}
	var err error
	if d.policy, err = access.OpenFile(cfg.Rules, log, access.ParsePolicy); err != nil {
		return nil, fmt.Errorf("access.rules: %w", err)
	}
	if d.passwords, err = openPasswords(cfg.Htpasswd, log); err != nil {
		return nil, fmt.Errorf("access.htpasswd: %w", err)
	}
	if d.issuers, err = access.OpenIssuers(cfg.OIDC, log); err != nil {
		return nil, fmt.Errorf("access: %w", err)
	}
	if d.audit, err = audit.Open(cfg.Audit, log); err != nil {
		return nil, fmt.Errorf("access.audit: %w", err)
	}
	d.signer = &signer{began: time.Now(), lost: make(chan struct{}, 1), publish: index.PutTokenKey, keyLife: time.Duration(cfg.KeyLifetime), lifetime: time.Duration(cfg.TokenLifetime), service: cfg.Service, log: log}
	d.state = access.NewState(func(ctx context.Context, have cluster.AccessState) (cluster.AccessState, error) {
		got, err := index.Access(ctx, have)
		if err == nil {
			d.signer.heard(got.Keys)
		}
		return got, err
	}, heardEvery, log)
	return d, nil
}

// RunState hears of keys and robots until ctx ends.
func (d *Door) RunState(ctx context.Context) error { return d.state.Run(ctx) }

// RunSigner makes keys for tokens until ctx ends.
func (d *Door) RunSigner(ctx context.Context) error { return d.signer.run(ctx) }

// Close ends the use of the audit's file.
func (d *Door) Close() error { return d.audit.Close() }

// Check returns what is wrong with what the door decides by, nil when nothing is.
func (d *Door) Check(context.Context) error {
	errs := []error{d.policy.Err(), d.state.Err(), d.signer.state()}
	if d.passwords.file != nil {
		errs = append(errs, d.passwords.file.Err())
	}
	return errors.Join(errs...)
}

// Ready returns nil once the door can let everybody in who may: it gives tokens, and has heard of the robots.
func (d *Door) Ready(context.Context) error {
	if !d.state.Heard() {
		return errors.New("keys and robots are not heard of yet")
	}
	return d.signer.ready()
}

// login is a caller, and how it has shown who it is.
type login struct {
	caller access.Caller
	shown  access.Shown
}

// errCredentials is credentials that show nobody. What it wraps is for this side.
var errCredentials = errors.New("the credentials are not valid")

// authenticate returns who makes a request, by what it shows. An error that is errCredentials, registry.ErrUnavailable
// or registry.ErrTooManyRequests.
func (d *Door) authenticate(r *http.Request) (login, error) {
	h := r.Header.Get("Authorization")
	scheme, value, _ := strings.Cut(h, " ")
	switch strings.ToLower(scheme) {
	case "":
		return d.byCertificate(r), nil
	case "basic":
		user, password, ok := r.BasicAuth()
		if !ok {
			return login{}, fmt.Errorf("%w: it is no user with a password", errCredentials)
		}
		if user == "" && password == "" {
			return d.byCertificate(r), nil
		}
		return d.byPassword(r, user, password)
	case "bearer":
		return d.byToken(r, strings.TrimSpace(value))
	}
	return login{}, fmt.Errorf("%w: the scheme is neither Basic nor Bearer", errCredentials)
}

func (d *Door) byCertificate(r *http.Request) login {
	if !d.cfg.Certificates {
		return login{}
	}
	c := transport.ClientCertificate(r)
	if c == nil {
		return login{}
	}
	if p, ok := transport.Identity(r); ok && p.Role == transport.RoleAgent {
		return login{access.Caller{Subject: access.NodePrefix + p.ID}, access.Shown{Via: access.ViaCertificate}}
	}
	if c.Subject.CommonName == "" {
		return login{}
	}
	who := access.Caller{Subject: access.CertPrefix + c.Subject.CommonName}
	for _, o := range c.Subject.Organization {
		who.Groups = append(who.Groups, access.CertPrefix+o)
	}
	return login{who, access.Shown{Via: access.ViaCertificate}}
}

// byPassword takes a user with a password, a robot with its key, or the user oidc with an ID token. Passwords can be
// guessed, so that who fails waits; the others can't, and a right one is never refused because of wrong ones.
func (d *Door) byPassword(r *http.Request, user, password string) (login, error) {
	if user == access.UserOIDC {
		l, err := d.byIDToken(r.Context(), password)
		return l, d.told(r, user, err)
	}
	if name, ok := strings.CutPrefix(user, access.RobotPrefix); ok {
		robot, ok, err := d.state.FindRobot(r.Context(), name, func(x cluster.Robot) bool { return isKey(password, x.Hash) })
		if err != nil {
			return login{}, err
		}
		if !ok {
			return login{}, d.told(r, user, fmt.Errorf("%w: there is no such robot, or its key is another", errCredentials))
		}
		return login{access.Caller{Subject: user}, access.Shown{Via: access.ViaRobot, Proof: robot.Generation}}, nil
	}
	if proof, ok := d.passwords.remembered(user, password); ok {
		return login{access.Caller{Subject: user}, access.Shown{Via: access.ViaPassword, Proof: proof}}, nil
	}
	proof, err := d.passwords.verify(d.throttle, transport.SourceOf(r.RemoteAddr), user, password)
	switch {
	case errors.Is(err, errThrottled):
		d.m.throttled.Inc()
	case errors.Is(err, errPassword):
		err = fmt.Errorf("%w: %w", errCredentials, err)
		d.failed(r, user, err)
	}
	return login{access.Caller{Subject: user}, access.Shown{Via: access.ViaPassword, Proof: proof}}, err
}

// told notes a failure with what nobody can guess, errCredentials. Of an address that has many they are answered 429,
// and not written down.
func (d *Door) told(r *http.Request, user string, err error) error {
	if !errors.Is(err, errCredentials) {
		return err
	}
	if wait := d.throttle.tell(transport.SourceOf(r.RemoteAddr)); wait > 0 {
		d.m.throttled.Inc()
		return &registry.RetryError{Err: errThrottled, After: wait}
	}
	d.failed(r, user, err)
	return err
}

func (d *Door) byIDToken(ctx context.Context, raw string) (login, error) {
	c, err := d.issuers.Verify(ctx, raw)
	switch {
	case errors.Is(err, access.ErrIssuer):
		return login{}, fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
	case err != nil:
		return login{}, fmt.Errorf("%w: %w", errCredentials, err)
	}
	return login{c, access.Shown{Via: access.ViaOIDC}}, nil
}

// byToken takes a token of this cluster, or of an issuer.
func (d *Door) byToken(r *http.Request, raw string) (login, error) {
	if !access.IsOwn(raw) {
		l, err := d.byIDToken(r.Context(), raw)
		return l, d.told(r, "", err)
	}
	c, err := d.state.Parse(r.Context(), raw, d.cfg.Service)
	if err == nil && c.Via == access.ViaPassword && d.passwords.proof(c.Subject) != c.Proof {
		err = fmt.Errorf("%w: its user was removed, or has another password", access.ErrToken)
	}
	if errors.Is(err, access.ErrToken) {
		return login{}, fmt.Errorf("%w: %w", errCredentials, err)
	}
	return login{c.Caller(), access.Shown{Via: c.Via, Proof: c.Proof}}, err
}

// failed notes a login that showed nobody: the user's name where it is one, and never what was shown.
func (d *Door) failed(r *http.Request, user string, err error) {
	d.m.failed.Inc()
	e := audit.Of(r)
	e.Event, e.Subject, e.Reference, e.Tags, e.Status, e.Reason = audit.LoginFailed, d.named(user), "", nil, http.StatusUnauthorized, err.Error()
	d.audit.Write(e)
}

// named returns a user's name for the audit, if it is one, or could be a robot's. Who pastes a key or a password where
// the name should stand has a hash there, which is another after the next start.
func (d *Door) named(user string) string {
	robot, isRobot := strings.CutPrefix(user, access.RobotPrefix)
	switch {
	case user == "", user == access.UserOIDC, d.passwords.has(user), isRobot && cluster.RobotName.MatchString(robot) && !strings.HasPrefix(robot, keyPrefix):
		return user
	}
	return "unknown-" + d.passwords.alias(user)
}

// isKey reports whether a robot's key has the hash.
func isKey(key, hash string) bool {
	return hash != "" && subtle.ConstantTimeCompare([]byte(hashOf(key)), []byte(hash)) == 1
}

// hashOf returns what is kept of a robot's key: it is random, so that a plain hash tells nothing.
func hashOf(key string) string {
	sum := sha256.Sum256([]byte(key))
	return hex.EncodeToString(sum[:])
}

// Allow implements registry.Access.
func (d *Door) Allow(r *http.Request, repository string, action registry.Action) (context.Context, error) {
	l, err := d.authenticate(r)
	if errors.Is(err, errCredentials) {
		return nil, d.challenge(r, repository, action, "invalid_token", errCredentials)
	}
	if err != nil {
		return nil, err
	}
	ctx := access.WithCaller(r.Context(), l.caller)
	decision, missing := d.policy.Get().Allowed(l.caller, repository, action)
	if action == registry.ActionEnter && l.caller.Subject == "" && !enters(l.caller) {
		// A client that is told so by GET /v2/ asks for a token, as a user or as anybody.
		return nil, d.challenge(r, repository, action, "", nil)
	}
	switch {
	case decision.Allowed:
		noteOf(ctx).allow(l.caller, repository, action)
		return ctx, nil
	case missing:
		return nil, d.challenge(r, repository, action, "insufficient_scope", nil)
	case !l.caller.Known():
		if l.caller.Scopes != nil {
			d.refused(r, l.caller, repository, action, http.StatusUnauthorized, decision.Why)
		}
		return nil, d.challenge(r, repository, action, "", nil)
	}
	d.refused(r, l.caller, repository, action, http.StatusForbidden, decision.Why)
	return nil, fmt.Errorf("%w: %s may not %s in %s", registry.ErrDenied, l.caller, action, repository)
}

// enters reports whether who has no name has a token, of the service that gives everybody one.
func enters(c access.Caller) bool { return c.Scopes != nil }

// May implements registry.Viewer.
func (d *Door) May(ctx context.Context, repository string, action registry.Action) bool {
	decision, missing := d.policy.Get().Allowed(access.CallerOf(ctx), repository, action)
	// No client knows by name all repositories that the catalog shows, or that a mount may take a blob from: of these
	// the rules decide alone.
	return decision.Allowed || missing && action == registry.ActionPull
}

func (d *Door) refused(r *http.Request, c access.Caller, repository string, action registry.Action, status int, why string) {
	d.m.refused.Inc()
	e := audit.Of(r)
	e.Event, e.Subject, e.Repository, e.Action, e.Status, e.Reason = audit.Refused, c.String(), repository, string(action), status, why
	d.audit.Write(e)
}

// challenge returns the 401 that sends a client to the token service.
func (d *Door) challenge(r *http.Request, repository string, action registry.Action, kind string, why error) error {
	return &registry.ChallengeError{Challenges: []string{access.Challenge(d.realm(r), d.cfg.Service, repository, action, kind)}, Err: why}
}

// realm returns the URL of the token service, as the client reaches it.
func (d *Door) realm(r *http.Request) string {
	if d.cfg.Realm != "" {
		return d.cfg.Realm
	}
	scheme := "http"
	if r.TLS != nil || strings.EqualFold(r.Header.Get("X-Forwarded-Proto"), "https") {
		scheme = "https"
	}
	return scheme + "://" + r.Host + TokenPath
}
