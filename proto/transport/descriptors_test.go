package transport

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"
)

// What begins is refused while a quarter or less is left, probes are not, and counting is not for each request.
func TestDescriptorsAreScarce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		open, counted := 0, 0
		d := &Descriptors{count: func() (int, int) { counted++; return open, 100 }}
		h := d.refuseScarce(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		for _, c := range []struct {
			open, status, probe int
			spent               bool
		}{{10, 200, 200, false}, {75, 200, 200, false}, {76, 503, 200, false}, {88, 503, 200, true}, {20, 200, 200, false}} {
			open = c.open
			time.Sleep(countedFor)
			counted = 0
			for path, want := range map[string]int{"/v2/": c.status, "/health": c.probe, "/readiness": c.probe} {
				w := httptest.NewRecorder()
				h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
				if w.Code != want {
					t.Errorf("%d open: %s answers %d, want %d", c.open, path, w.Code, want)
				}
				if w.Code == 503 && (w.Header().Get("Retry-After") == "" || w.Header().Get("Connection") != "close") {
					t.Errorf("%d open: %v", c.open, w.Header())
				}
			}
			if d.spent() != c.spent || counted != 1 || (d.Check() == nil) != (c.status == 200) {
				t.Errorf("%d open: spent %t, counted %d times, check %v", c.open, d.spent(), counted, d.Check())
			}
		}
	})
}

// Connections count from the moment when they are accepted, however many come before descriptors are counted again.
func TestConnectionsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		open := 70
		d := &Descriptors{count: func() (int, int) { return open, 100 }}
		if d.Scarce() {
			t.Error("70 of 100 are scarce")
		}
		for n := 71; n <= 100; n++ {
			d.take()
			if d.Scarce() != (n > 75) || d.spent() != (n > 87) {
				t.Errorf("with %d of 100: scarce %t, spent %t", n, d.Scarce(), d.spent())
			}
		}
		time.Sleep(countedFor)
		if d.Scarce() {
			t.Error("connections that were closed count")
		}
	})
}
