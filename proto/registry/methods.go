package registry

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// allow returns the methods that a kind of route has here, OPTIONS included. A part that is nil has none.
func (s Server) allow(kind string) []string {
	var out []string
	has := func(part bool, methods ...string) {
		if part {
			out = append(out, methods...)
		}
	}
	switch kind {
	case "":
		has(true, http.MethodGet, http.MethodHead)
	case "catalog":
		has(s.Catalog != nil, http.MethodGet, http.MethodHead)
	case "tags":
		has(s.Tags != nil, http.MethodGet, http.MethodHead)
	case "referrers":
		has(s.Referrers != nil, http.MethodGet, http.MethodHead)
	case "manifest":
		has(s.Manifests != nil, http.MethodGet, http.MethodHead)
		has(s.ManifestWriter != nil, http.MethodPut, http.MethodDelete)
	case "blob":
		has(s.Blobs != nil, http.MethodGet, http.MethodHead)
		has(s.BlobDeleter != nil, http.MethodDelete)
	case "uploads":
		has(s.Uploads != nil, http.MethodPost)
	case "upload":
		has(s.Uploads != nil, http.MethodGet, http.MethodHead, http.MethodPatch, http.MethodPut, http.MethodDelete)
	}
	return append(out, http.MethodOptions)
}

func reads(r *http.Request) bool { return r.Method == http.MethodGet || r.Method == http.MethodHead }

// checkMethod answers what asks for the methods alone, and refuses a method that the route does not have; done says
// that it did one of both. The extension's routes differ by resource, and check for themselves.
func (s Server) checkMethod(w http.ResponseWriter, r *http.Request, kind string) (done bool, err error) {
	allow := s.allow(kind)
	switch {
	case kind == "extension":
		return false, nil
	case r.Method == http.MethodOptions:
		w.Header().Set("Allow", strings.Join(allow, ", "))
		w.WriteHeader(http.StatusNoContent)
		return true, nil
	case !slices.Contains(allow, r.Method):
		w.Header().Set("Allow", strings.Join(allow, ", "))
		return true, s.unsupported(r)
	}
	return false, nil
}

// unsupported returns the error for a method that the route does not have here, an ErrUnsupported.
func (s Server) unsupported(r *http.Request) error {
	if s.ReadOnly != "" && !reads(r) {
		return fmt.Errorf("%w: %s", ErrUnsupported, s.ReadOnly)
	}
	return fmt.Errorf("%w: %s here", ErrUnsupported, r.Method)
}
