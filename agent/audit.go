package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"kraken/proto/access"
	"kraken/proto/audit"
	"kraken/proto/registry"
)

// Refusals are written down as at the proxies. An agent changes nothing, so there are no other lines.

// Of each kind linesAtOnce lines are written, and then one in lineEvery: all who ask here are of one node, and any of
// them can be refused as often as it likes.
const (
	linesAtOnce = 30
	lineEvery   = 2 * time.Second
)

// recorder writes the agent's audit.
type recorder struct {
	log             *audit.Log
	failed, refused *seldom
	alias           func(string) string
}

// openRecorder returns what writes to the configured file.
func (a *Agent) openRecorder() (*recorder, error) {
	l, err := audit.Open(a.cfg.Access.Audit, a.log)
	return &recorder{l, newSeldom(l), newSeldom(l), a.alias}, err
}

// Close ends the use of the file.
func (r *recorder) Close() error { return r.log.Close() }

// seldom writes the lines of one kind, as many as are allowed. It is safe for concurrent use.
type seldom struct {
	log     *audit.Log
	limit   *rate.Limiter
	leftOut atomic.Int64 // since the last line
}

func newSeldom(l *audit.Log) *seldom {
	return &seldom{log: l, limit: rate.NewLimiter(rate.Every(lineEvery), linesAtOnce)}
}

// write writes e, with how many lines were left out before it, or leaves it out.
func (s *seldom) write(e audit.Event) {
	if !s.limit.Allow() {
		s.leftOut.Add(1)
		return
	}
	e.LeftOut = int(s.leftOut.Swap(0))
	s.log.Write(e)
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
	r.refused.write(e)
}

// loginFailed writes the line of a request whose credentials show nobody. What expires every few minutes, a token of
// the cluster's own, is none.
func (r *recorder) loginFailed(q *http.Request, repository string, why error) {
	user, _, basic := q.BasicAuth()
	if !basic && access.IsOwn(bearerOf(q)) {
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
	r.failed.write(e)
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
