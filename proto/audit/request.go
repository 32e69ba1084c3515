package audit

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"path"
	"strings"

	"github.com/google/uuid"

	"kraken/proto/registry"
)

type idKey struct{}

// Identify returns the request with an id of its own, which the answer has as X-Request-Id and the request's lines as
// RequestID, whatever others call it.
func Identify(w http.ResponseWriter, r *http.Request) *http.Request {
	id := uuid.NewString()
	w.Header().Set("X-Request-Id", id)
	return r.WithContext(context.WithValue(r.Context(), idKey{}, id))
}

// Of returns an event with what the request says: from where it is, what it asks for, and what it is called.
func Of(r *http.Request) Event {
	id, ok := r.Context().Value(idKey{}).(string)
	if !ok {
		id = uuid.NewString()
	}
	theirs := r.Header.Get("X-Request-Id")
	return Event{
		Source: r.RemoteAddr, Method: r.Method, Reference: referenceOf(r), Tags: tagsIn(r.URL.Query()),
		RequestID: id, ClientRequestID: theirs[:min(len(theirs), 128)],
	}
}

// Clip bounds what a client makes us write.
func Clip(s string) string { return s[:min(len(s), 255)] }

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
		return Clip(last)
	}
	return ""
}

// StatusWriter remembers the status of an answer.
type StatusWriter struct {
	http.ResponseWriter
	Status int // 0 before the header
}

// WriteHeader implements http.ResponseWriter.
func (w *StatusWriter) WriteHeader(status int) {
	if w.Status == 0 {
		w.Status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (w *StatusWriter) Write(b []byte) (int, error) {
	if w.Status == 0 {
		w.Status = http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

// ReadFrom keeps sendfile.
func (w *StatusWriter) ReadFrom(r io.Reader) (int64, error) {
	if w.Status == 0 {
		w.Status = http.StatusOK
	}
	return io.Copy(w.ResponseWriter, r)
}

// Unwrap is for http.ResponseController.
func (w *StatusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
