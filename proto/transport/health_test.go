package transport

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func ask(t *testing.T, h http.Handler, path string) (int, readiness) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
	var r readiness
	if err := json.Unmarshal(w.Body.Bytes(), &r); err != nil {
		t.Fatalf("%s: %v in %q", path, err, w.Body)
	}
	if cc := w.Header().Get("Cache-Control"); cc != "no-store" {
		t.Errorf("%s: Cache-Control %q", path, cc)
	}
	return w.Code, r
}

func TestReadiness(t *testing.T) {
	down := func(context.Context) error { return errors.New("down") }
	up := func(context.Context) error { return nil }
	type checks map[string]struct {
		required bool
		fn       func(context.Context) error
	}
	for name, tc := range map[string]struct {
		checks checks
		drain  bool
		status int
		want   readiness
	}{
		"nothing to check": {nil, false, 200, readiness{Status: "ready"}},
		"all well":         {checks{"store": {true, up}, "tracker": {false, up}}, false, 200, readiness{Status: "ready"}},
		"degraded": {checks{"store": {true, up}, "tracker": {false, down}}, false, 200,
			readiness{Status: "ready", Degraded: []failure{{"tracker", "down"}}}},
		"failed": {checks{"store": {true, down}, "tracker": {false, up}}, false, 503,
			readiness{Status: "not ready", Failed: []failure{{"store", "down"}}}},
		"both": {checks{"store": {true, down}, "tracker": {false, down}}, false, 503,
			readiness{Status: "not ready", Failed: []failure{{"store", "down"}}, Degraded: []failure{{"tracker", "down"}}}},
		"draining": {checks{"store": {true, up}}, true, 503, readiness{Status: "draining"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := NewHealth()
			for n, c := range tc.checks {
				h.AddCheck(n, c.required, c.fn)
			}
			if tc.drain {
				h.SetDraining()
			}
			admin := AdminHandler(ServerConfig{}, h, prometheus.NewRegistry())
			status, got := ask(t, admin, "/readiness")
			if status != tc.status || !reflect.DeepEqual(got, tc.want) {
				t.Errorf("readiness is %d %+v, want %d %+v", status, got, tc.status, tc.want)
			}
			if status, got := ask(t, admin, "/health"); status != 200 || got.Status != "ok" {
				t.Errorf("health is %d %+v", status, got)
			}
		})
	}
}

// TestReadinessIsCheap: one round a second answers any number of askers, and a slow check is cut off.
func TestReadinessIsCheap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var rounds atomic.Int32
		h := NewHealth()
		h.AddCheck("slow", false, func(ctx context.Context) error {
			rounds.Add(1)
			<-ctx.Done()
			return ctx.Err()
		})
		h.AddCheck("slow too", false, func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		})
		admin := AdminHandler(ServerConfig{}, h, prometheus.NewRegistry())
		began := time.Now()
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if status, got := ask(t, admin, "/readiness"); status != 200 || len(got.Degraded) != 2 {
					t.Errorf("readiness is %d %+v", status, got)
				}
			})
		}
		wg.Wait()
		if d := time.Since(began); d != checkTimeout {
			t.Errorf("answered after %s, want %s: checks run together", d, checkTimeout)
		}
		if n := rounds.Load(); n != 1 {
			t.Errorf("%d rounds for askers at once", n)
		}
		time.Sleep(checkFresh - 1)
		ask(t, admin, "/readiness")
		if n := rounds.Load(); n != 1 {
			t.Errorf("%d rounds while the answer is fresh", n)
		}
		time.Sleep(time.Nanosecond)
		ask(t, admin, "/readiness")
		if n := rounds.Load(); n != 2 {
			t.Errorf("%d rounds after it went stale", n)
		}
	})
}

// TestDrainingShowsAtOnce: a fresh good answer does not hide it.
func TestDrainingShowsAtOnce(t *testing.T) {
	h := NewHealth()
	admin := AdminHandler(ServerConfig{}, h, prometheus.NewRegistry())
	if status, _ := ask(t, admin, "/readiness"); status != 200 {
		t.Fatalf("status %d", status)
	}
	h.SetDraining()
	if status, _ := ask(t, admin, "/readiness"); status != 503 {
		t.Errorf("status %d while draining", status)
	}
}

// TestAskerMayLeave: the round that it began still answers the others.
func TestAskerMayLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHealth()
		h.AddCheck("slow", true, func(ctx context.Context) error {
			select {
			case <-time.After(time.Second):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		ctx, leave := context.WithCancel(t.Context())
		var first sync.WaitGroup
		first.Go(func() {
			h.Readiness(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, http.MethodGet, "/readiness", nil))
		})
		synctest.Wait()
		leave()
		if status, got := ask(t, AdminHandler(ServerConfig{}, h, prometheus.NewRegistry()), "/readiness"); status != 200 {
			t.Errorf("readiness is %d %+v", status, got)
		}
		first.Wait()
	})
}

func TestAdminRoutes(t *testing.T) {
	admin := AdminHandler(ServerConfig{}, NewHealth(), prometheus.NewRegistry())
	for path, want := range map[string]int{"/metrics": 200, "/debug/pprof/": 404, "/debug/pprof/heap": 404, "/nothing": 404} {
		w := httptest.NewRecorder()
		admin.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		if w.Code != want {
			t.Errorf("%s: status %d, want %d", path, w.Code, want)
		}
	}
}

// TestReadinessNamesNoAddress: clients are told what is down, operators also where it was sought.
func TestReadinessNamesNoAddress(t *testing.T) {
	h := NewHealth()
	h.AddCheck("origin-01", false, func(context.Context) error {
		return &url.Error{Op: "GET", URL: "http://10.1.2.3:16031/v2/", Err: syscall.ECONNREFUSED}
	})
	if _, got := ask(t, http.HandlerFunc(h.Readiness), "/readiness"); got.Degraded[0].Error != "connection refused" {
		t.Errorf("clients are told %+v", got)
	}
	if _, got := ask(t, AdminHandler(ServerConfig{}, h, prometheus.NewRegistry()), "/readiness"); !strings.Contains(got.Degraded[0].Error, "10.1.2.3") {
		t.Errorf("operators are told %+v", got)
	}
}

// A check that waits for a disk, and does not heed its context, keeps nobody waiting beyond the time that checks have.
func TestReadinessDoesNotWaitForWhatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHealth()
		hang := make(chan struct{})
		var calls atomic.Int32
		h.AddCheck("disk", false, func(context.Context) error {
			calls.Add(1)
			<-hang
			return nil
		})
		h.AddCheck("store", true, func(context.Context) error { return nil })
		for range 2 {
			began := time.Now()
			status, r := ask(t, http.HandlerFunc(h.Readiness), "/readiness")
			if took := time.Since(began); status != 200 || len(r.Degraded) != 1 || took > checkTimeout {
				t.Errorf("%d %+v after %s", status, r, took)
			}
			time.Sleep(2 * checkFresh)
		}
		if n := calls.Load(); n != 1 {
			t.Errorf("the check that hangs was begun %d times", n)
		}
		close(hang)
	})
}
