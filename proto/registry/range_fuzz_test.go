package registry

import (
	"bytes"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// FuzzRange asks a blob for whatever a client may write: the answer is the whole blob, 416, or parts of it, each where
// it says it is.
func FuzzRange(f *testing.F) {
	for _, s := range []string{"bytes=0-0", "bytes=-1", "bytes=5-", "bytes=0-1,3-4", "bytes=-0", "bytes=9223372036854775807-", "bytes= 1 - 2", "lines=1-2", "bytes=3-2,-5", "BYTES=1-2"} {
		f.Add(s)
	}
	content := []byte("0123456789abcdefghij")
	d := digest.FromBytes(content)
	f.Fuzz(func(t *testing.T, spec string) {
		m := newMemory()
		m.put("a", content, d)
		r := httptest.NewRequest(http.MethodGet, "/v2/a/blobs/"+d.String(), nil)
		r.Header.Set("Range", spec)
		w := httptest.NewRecorder()
		m.server().Handler().ServeHTTP(w, r)
		switch w.Code {
		case http.StatusRequestedRangeNotSatisfiable:
		case http.StatusOK:
			if !bytes.Equal(w.Body.Bytes(), content) {
				t.Errorf("Range %q: 200 with %q", spec, w.Body)
			}
		case http.StatusPartialContent:
			kind, params, _ := mime.ParseMediaType(w.Header().Get("Content-Type"))
			if kind != "multipart/byteranges" {
				checkPart(t, spec, content, w.Header().Get("Content-Range"), w.Body.Bytes())
				return
			}
			parts := multipart.NewReader(w.Body, params["boundary"])
			for {
				p, err := parts.NextPart()
				if err == io.EOF {
					return
				}
				if err != nil {
					t.Fatalf("Range %q: %v", spec, err)
				}
				b, err := io.ReadAll(p)
				if err != nil {
					t.Fatalf("Range %q: %v", spec, err)
				}
				checkPart(t, spec, content, p.Header.Get("Content-Range"), b)
			}
		default:
			t.Errorf("Range %q: status %d: %s", spec, w.Code, w.Body)
		}
	})
}

// checkPart compares a part with what its Content-Range says it is.
func checkPart(t *testing.T, spec string, content []byte, contentRange string, got []byte) {
	t.Helper()
	at, size, _ := strings.Cut(strings.TrimPrefix(contentRange, "bytes "), "/")
	from, to, _ := strings.Cut(at, "-")
	first, err1 := strconv.Atoi(from)
	last, err2 := strconv.Atoi(to)
	if err1 != nil || err2 != nil || size != strconv.Itoa(len(content)) || first < 0 || last < first || last >= len(content) {
		t.Fatalf("Range %q: Content-Range %q", spec, contentRange)
	}
	if !bytes.Equal(got, content[first:last+1]) {
		t.Errorf("Range %q: %q as %q", spec, got, contentRange)
	}
}
