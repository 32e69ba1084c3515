package login

import (
	"context"
	"io"
	"net/http"
	"path"
	"strings"

	"kraken/proto/access"
)

// note is what is learned of a request while it is served, for its line in the audit.
type note struct {
	id     string
	caller access.Caller
}

type noteKey struct{}

func noteOf(ctx context.Context) *note {
	n, _ := ctx.Value(noteKey{}).(*note)
	return n
}

// Audited writes a line for each request that changed something. Reads are served as they are; what is refused is
// written where that is decided.
func (d *Door) Audited(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := &note{id: newRequestID(r)}
		r = r.WithContext(context.WithValue(r.Context(), noteKey{}, n))
		w.Header().Set("X-Request-Id", n.id)
		if r.Method == http.MethodGet || r.Method == http.MethodHead || r.Method == http.MethodOptions {
			next.ServeHTTP(w, r)
			return
		}
		sw := &statusWriter{ResponseWriter: w}
		next.ServeHTTP(sw, r)
		if !changes(r.Method, sw.status) {
			return
		}
		d.audit.write(Event{
			Event: eventChange, Subject: n.caller.String(), Source: r.RemoteAddr, Method: r.Method, Repository: repositoryOf(r.URL.Path),
			Reference: referenceOf(r), Digest: w.Header().Get("Docker-Content-Digest"), Status: sw.status, RequestID: n.id,
		})
	})
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

// repositoryOf returns the repository of a path that was served.
func repositoryOf(p string) string {
	p = strings.TrimPrefix(p, "/v2/")
	return p[:max(0, strings.LastIndex(p, "/blobs/"), strings.LastIndex(p, "/manifests/"))]
}

// referenceOf returns the tag or digest that a request to a manifest or blob names.
func referenceOf(r *http.Request) string {
	dir, last := path.Split(r.URL.Path)
	if strings.HasSuffix(dir, "/manifests/") || strings.HasSuffix(dir, "/blobs/") && last != "uploads" {
		return clip(last)
	}
	return ""
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
