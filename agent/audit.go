package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"time"

	"golang.org/x/time/rate"

	"kraken/proto/access"
	"kraken/proto/audit"
	"kraken/proto/registry"
)

// Refusals are written down as at the proxies. An agent changes nothing, so there are no other lines.

// Logins that failed with what nobody can guess are told of failedAtOnce times, and then one in failedEvery: all who
// ask here are of one node.
const (
	failedAtOnce = 30
	failedEvery  = 2 * time.Second
)

// recorder writes the agent's audit.
type recorder struct {
	*audit.Log
	failed *rate.Limiter
	alias  func(string) string
}

// openRecorder returns what writes to the configured file.
func (a *Agent) openRecorder() (*recorder, error) {
	l, err := audit.Open(a.cfg.Access.Audit, a.log)
	return &recorder{l, rate.NewLimiter(rate.Every(failedEvery), failedAtOnce), a.alias}, err
}

// alias returns what a text is called where it is not to be read: the same while this process runs.
func (a *Agent) alias(text string) string {
	sum := sha256.Sum256(append(a.callerKey[:], "alias\x00"+text...))
	return "unknown-" + hex.EncodeToString(sum[:4])
}

// refuse writes the line of a request that its caller may not do.
func (r *recorder) refuse(q *http.Request, who, repository string, action registry.Action, status int, why string) {
	e := audit.Of(q)
	e.Event, e.Subject, e.Repository, e.Action, e.Status, e.Reason = audit.Refused, who, repository, string(action), status, why
	r.Write(e)
}

// loginFailed writes the line of a request whose credentials show nobody. What expires every few minutes, a token of
// the cluster's own, is none.
func (r *recorder) loginFailed(q *http.Request, repository string, why error) {
	user, _, basic := q.BasicAuth()
	if !basic && access.IsOwn(bearerOf(q)) || !r.failed.Allow() {
		return
	}
	e := audit.Of(q)
	e.Event, e.Repository, e.Status, e.Reason = audit.LoginFailed, repository, http.StatusUnauthorized, why.Error()
	switch {
	case basic && user != access.UserOIDC:
		e.Subject = r.alias(user)
	case basic:
		e.Subject = user
	}
	r.Write(e)
}

// asked is what is learned of a request while it is served.
type asked struct {
	upstreams string // the repository that an upstream gives to the credentials that were shown, or not
	shown     string // these
}

type askedKey struct{}

// noteAsked remembers what an upstream decides about.
func noteAsked(ctx context.Context, repository, shown string) {
	if n, ok := ctx.Value(askedKey{}).(*asked); ok {
		n.upstreams, n.shown = repository, shown
	}
}

// audited gives each request an id, and writes a line where an upstream refused what was shown to it. What the agent
// refuses itself is written where that is decided, and who shows nothing yet is not refused.
func (a *Agent) audited(next http.Handler) http.Handler {
	if a.cfg.Access.Audit == "" {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r = audit.Identify(w, r)
		if r.Header.Get("Authorization") == "" {
			next.ServeHTTP(w, r)
			return
		}
		n, sw := &asked{}, &audit.StatusWriter{ResponseWriter: w}
		r = r.WithContext(context.WithValue(r.Context(), askedKey{}, n))
		next.ServeHTTP(sw, r)
		if n.upstreams != "" && (sw.Status == http.StatusUnauthorized || sw.Status == http.StatusForbidden) {
			a.audit.refuse(r, a.alias(n.shown), n.upstreams, registry.ActionPull, sw.Status, "the registry that it is a mirror of does not give it to these credentials")
		}
	})
}
