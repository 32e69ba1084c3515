package registry

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestBrokenBody has a body end in an error: it is the client's, whatever read it.
func TestBrokenBody(t *testing.T) {
	d := digest.FromString("hello")
	for _, c := range []struct {
		err  error
		want int
	}{
		{io.ErrUnexpectedEOF, http.StatusBadRequest}, {errors.New("malformed chunked encoding"), http.StatusBadRequest},
		{fmt.Errorf("read tcp: %w", os.ErrDeadlineExceeded), http.StatusRequestTimeout},
	} {
		for _, route := range []string{
			"POST /v2/a/blobs/uploads/?digest=" + d.String(), "PATCH /v2/a/blobs/uploads/session-1", "PUT /v2/a/blobs/uploads/session-1?digest=" + d.String(),
		} {
			m := newMemory()
			m.uploads["a session-1"] = []byte{}
			method, path, _ := strings.Cut(route, " ")
			r := httptest.NewRequest(method, path, io.MultiReader(strings.NewReader("hel"), brokenBody{c.err}))
			w := httptest.NewRecorder()
			m.server().Handler().ServeHTTP(w, r)
			if w.Code != c.want {
				t.Errorf("%s, %v: status %d, want %d: %s", route, c.err, w.Code, c.want, w.Body)
			}
		}
	}
}

type brokenBody struct{ err error }

func (b brokenBody) Read([]byte) (int, error) { return 0, b.err }
