package login

import (
	"cmp"
	"context"
	"net/http"
	"path"
	"strings"

	"kraken/proto/access"
	"kraken/proto/audit"
	"kraken/proto/registry"
)

// note is what is learned of a request while it is served, for its line in the audit.
type note struct {
	caller     access.Caller
	repository string // that is meant, however the path calls it
	allowed    bool   // to change it
}

type noteKey struct{}

func noteOf(ctx context.Context) *note {
	n, _ := ctx.Value(noteKey{}).(*note)
	return n
}

// allow notes that the caller may do what a request is for.
func (n *note) allow(c access.Caller, repository string, action registry.Action) {
	if n != nil {
		n.caller, n.repository, n.allowed = c, repository, action == registry.ActionPush || action == registry.ActionDelete
	}
}

// Audited writes a line for each request that changed something, or may have: one whose client went away, or whose end
// this side does not know, has the outcome unknown. Reads are served as they are; what is refused is written where that
// is decided.
func (d *Door) Audited(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := &note{}
		r = audit.Identify(w, r)
		r = r.WithContext(context.WithValue(r.Context(), noteKey{}, n))
		if r.Method == http.MethodGet || r.Method == http.MethodHead || r.Method == http.MethodOptions {
			next.ServeHTTP(w, r)
			return
		}
		sw := &audit.StatusWriter{ResponseWriter: w}
		defer d.change(sw, r, n) // also when the handler is aborted
		next.ServeHTTP(sw, r)
	})
}

// change writes the line of a request that was served.
func (d *Door) change(w *audit.StatusWriter, r *http.Request, n *note) {
	changed, known := changes(r.Method, w.Status), w.Status != 0 && w.Status < http.StatusInternalServerError
	if !n.allowed || !changed && (known || !mayChange(r)) {
		return
	}
	e := audit.Of(r)
	e.Event, e.Subject, e.Repository, e.Status = audit.Change, n.caller.String(), n.repository, w.Status
	if changed {
		e.Tags, e.Digest = w.Header().Values("OCI-Tag"), w.Header().Get("Docker-Content-Digest")
	} else {
		q := r.URL.Query()
		e.Outcome, e.Digest = audit.OutcomeUnknown, audit.Clip(cmp.Or(q.Get("digest"), q.Get("mount")))
	}
	d.audit.Write(e)
}

// changes reports whether a request has changed what the registry has: a blob or manifest that was made, a deletion. A
// session that was begun, went on or was given up is no change.
func changes(method string, status int) bool {
	switch method {
	case http.MethodPut, http.MethodPost:
		return status == http.StatusCreated
	case http.MethodDelete:
		return status == http.StatusAccepted
	}
	return false
}

// mayChange reports whether a request is one that changes reports true of, when all goes well.
func mayChange(r *http.Request) bool {
	switch q := r.URL.Query(); r.Method {
	case http.MethodPut:
		return true
	case http.MethodPost:
		return q.Has("digest") || q.Has("mount")
	case http.MethodDelete:
		return !strings.HasSuffix(path.Dir(r.URL.Path), "/blobs/uploads")
	}
	return false
}
