package login

import (
	"cmp"
	"context"
	"io"
	"net/http"
	"net/url"
	"path"
	"strings"

	"github.com/google/uuid"

	"kraken/proto/access"
	"kraken/proto/registry"
)

// note is what is learned of a request while it is served, for its line in the audit.
type note struct {
	id         string
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
		n := &note{id: uuid.NewString()}
		r = r.WithContext(context.WithValue(r.Context(), noteKey{}, n))
		w.Header().Set("X-Request-Id", n.id)
		if r.Method == http.MethodGet || r.Method == http.MethodHead || r.Method == http.MethodOptions {
			next.ServeHTTP(w, r)
			return
		}
		sw := &statusWriter{ResponseWriter: w}
		defer d.change(sw, r, n) // also when the handler is aborted
		next.ServeHTTP(sw, r)
	})
}

// change writes the line of a request that was served.
func (d *Door) change(w *statusWriter, r *http.Request, n *note) {
	changed, known := changes(r.Method, w.status), w.status != 0 && w.status < http.StatusInternalServerError
	if !n.allowed || !changed && (known || !mayChange(r)) {
		return
	}
	e := Event{
		Event: eventChange, Subject: n.caller.String(), Source: r.RemoteAddr, Method: r.Method, Repository: n.repository, Reference: referenceOf(r),
		Tags: w.Header().Values("OCI-Tag"), Digest: w.Header().Get("Docker-Content-Digest"), Status: w.status, RequestID: n.id, ClientRequestID: clientRequestID(r),
	}
	if !changed {
		q := r.URL.Query()
		e.Outcome, e.Tags, e.Digest = outcomeUnknown, tagsIn(q), clip(cmp.Or(q.Get("digest"), q.Get("mount")))
	}
	d.audit.write(e)
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

// tagsIn returns the tags that a push of a manifest by digest asks for.
func tagsIn(q url.Values) (out []string) {
	for _, t := range q["tag"] {
		if registry.CheckTag(t) == nil && len(out) < registry.MaxTagParameters {
			out = append(out, t)
		}
	}
	return out
}

// referenceOf returns the tag or digest that a request to a manifest or blob names.
func referenceOf(r *http.Request) string {
	dir, last := path.Split(r.URL.Path)
	if strings.HasSuffix(dir, "/manifests/") || strings.HasSuffix(dir, "/blobs/") && last != "uploads" {
		return clip(last)
	}
	return ""
}

// requestID is what a request is called here, whatever others call it.
func requestID(r *http.Request) string {
	if n := noteOf(r.Context()); n != nil {
		return n.id
	}
	return uuid.NewString()
}

// clientRequestID is what the client calls a request, or who stands in front.
func clientRequestID(r *http.Request) string {
	id := r.Header.Get("X-Request-Id")
	return id[:min(len(id), 128)]
}

// statusWriter remembers the status of an answer to a request that writes.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

// ReadFrom keeps sendfile.
func (w *statusWriter) ReadFrom(r io.Reader) (int64, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return io.Copy(w.ResponseWriter, r)
}

// Unwrap is for http.ResponseController.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
