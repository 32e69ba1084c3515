package buildindex

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/cluster"
)

// Each 503 says whether it is the build-index that is away for a moment, which who asks waits for, or something beside
// it, of which a restart's patience would only make many requests.
func TestSaysWhetherItIsAway(t *testing.T) {
	r := newRig(t)
	h, err := r.x.handler(prometheus.NewRegistry())
	r.must(err)
	want := func(when, method, ref, away string) {
		t.Helper()
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, "/v2/repo/manifests/"+ref, nil))
		if got := w.Header().Get(cluster.AwayHeader); w.Code != http.StatusServiceUnavailable || got != away || w.Header().Get("Retry-After") == "" {
			t.Errorf("%s: %d, %s %q, want %q: %s", when, w.Code, cluster.AwayHeader, got, away, w.Body)
		}
		if isAway := cluster.IsAway(w.Result()); isAway != (away == "true") {
			t.Errorf("%s: who asks takes it for away: %t", when, isAway)
		}
	}
	want("not begun", http.MethodGet, "v", "true")
	r.must(r.x.takeOver(t.Context()))
	want("names are being restored", http.MethodHead, "v", "true")
	want("names are being restored", http.MethodGet, "v", "true")
	r.must(r.x.fill(t.Context()))
	r.put("v", "one")
	set := func(change func(*fakeOrigin)) {
		for _, o := range r.origins {
			o.set(func() { change(o) })
		}
	}
	set(func(o *fakeOrigin) { o.down = true })
	want("no origin keeps the change", http.MethodDelete, "v", "false")
	set(func(o *fakeOrigin) {
		o.down, o.holder = false, holder{id: "vm/other", until: time.Now().Add(time.Hour)}
	})
	want("another has begun", http.MethodDelete, "v", "true")
	r.must(r.x.look(time.Now().Add(-holdFor-time.Second), answer{kept: true}, nil))
	want("stood still", http.MethodGet, "v", "true")
	_ = r.x.look(time.Now(), answer{}, errHeld)
	want("another has followed", http.MethodGet, "v", "true")
}

// Who is between, and a build-index of the version before, say nothing.
func TestTakenForAway(t *testing.T) {
	for _, c := range []struct {
		status int
		header string
		want   bool
	}{{503, "", true}, {503, "true", true}, {503, "false", false}, {504, "", false}, {200, "true", false}} {
		h := http.Header{}
		if c.header != "" {
			h.Set(cluster.AwayHeader, c.header)
		}
		if got := cluster.IsAway(&http.Response{StatusCode: c.status, Header: h}); got != c.want {
			t.Errorf("%+v: %t", c, got)
		}
	}
}
