package proxy

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/registry"
)

func TestUploadsUnderWayAreBounded(t *testing.T) {
	f := newInFlight(3, 2)
	var leave []func()
	for _, source := range []string{"a", "a", "b"} {
		l, err := f.enter(source)
		if err != nil {
			t.Fatal(err)
		}
		leave = append(leave, l)
	}
	for _, source := range []string{"a", "b", "c"} {
		if _, err := f.enter(source); !errors.Is(err, registry.ErrTooManyRequests) {
			t.Errorf("one more of %s: %v, want ErrTooManyRequests", source, err)
		}
	}
	leave[0]()
	if _, err := f.enter("a"); err != nil {
		t.Error(err)
	}
}

// Uploads beyond the bound are 429 with words; reads and manifests go on.
func TestOnlyUploadsAreRefused(t *testing.T) {
	f := newInFlight(1, 1)
	served := f.uploads(newMetrics(prometheus.NewRegistry()), http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	if _, err := f.enter("192.0.2.1"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		method, path string
		want         int
	}{
		{"POST", "/v2/a/blobs/uploads/", 429}, {"PATCH", "/v2/a/blobs/uploads/x", 429}, {"GET", "/v2/a/blobs/uploads/x", 200},
		{"DELETE", "/v2/a/blobs/uploads/x", 200}, {"PUT", "/v2/a/manifests/v1", 200},
	} {
		w := httptest.NewRecorder()
		served.ServeHTTP(w, httptest.NewRequest(c.method, c.path, nil)) // from 192.0.2.1
		if w.Code != c.want || c.want == 429 && (w.Body.Len() == 0 || w.Header().Get("Retry-After") == "") {
			t.Errorf("%s %s: %d %s, want %d", c.method, c.path, w.Code, w.Body, c.want)
		}
	}
}
