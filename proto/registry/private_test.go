package registry

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// Where access is controlled a cache that several share must not keep blobs.
func TestPrivateBlobs(t *testing.T) {
	for _, private := range []bool{false, true} {
		m := newMemory()
		m.put("a", []byte("hello"), digest.FromString("hello"))
		s := m.server()
		s.Private = private
		h := s.Handler()
		for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodDelete, http.MethodGet} {
			r := httptest.NewRequest(method, "/v2/a/blobs/"+digest.FromString("hello").String(), nil)
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			got := w.Header().Get("Cache-Control")
			switch {
			case w.Code == http.StatusNotFound && got != "":
				t.Errorf("%s: a missing blob is said to be %q", method, got)
			case w.Code == http.StatusOK && strings.HasPrefix(got, "private, ") != private:
				t.Errorf("private %v: %s: %q", private, method, got)
			}
		}
	}
}
