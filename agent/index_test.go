package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/config"
	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/proto/role"
)

// manifests is a build-index with one tag. wait runs before each answer and says whether there is one.
type manifests struct {
	mu    sync.Mutex
	tag   string // the manifest
	asked int
	wait  func(r *http.Request) bool
}

func (m *manifests) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	m.asked++
	wait := m.wait
	m.mu.Unlock()
	if wait != nil && !wait(r) {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
	w.Header().Set("Docker-Content-Digest", digest.FromString(m.tag).String())
	fmt.Fprint(w, m.tag)
}

// serve moves the tag and changes how the next questions are answered.
func (m *manifests) serve(tag string, wait func(*http.Request) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tag, m.wait, m.asked = tag, wait, 0
}

func manifestOf(what string) string {
	return `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","annotations":{"a":"` + what + `"}}`
}

// tag asks an agent for the tag and returns what it says.
func (r *running) tag() (status int, body, warning string) {
	resp, err := http.Get(fmt.Sprintf("http://%s/v2/demo/app/manifests/v1", r.Addr()))
	if err != nil {
		r.t.Error(err)
		return 0, "", ""
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Error(err)
	}
	return resp.StatusCode, string(b), resp.Header.Get("Warning")
}

// later answers after a time, if the asker still waits.
func later(d time.Duration) func(*http.Request) bool {
	return func(r *http.Request) bool {
		select {
		case <-time.After(d):
			return true
		case <-r.Context().Done():
			return false
		}
	}
}

// A tag that was moved is never answered with its old digest because build-index is slow: the truth is waited for, with
// one question for all who ask.
func TestSlowBuildIndex(t *testing.T) {
	b := &manifests{}
	s := httptest.NewServer(b)
	t.Cleanup(s.Close)
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	r := startWith(t, Config{
		Config:  role.Config{Origins: []ring.Member{{ID: "o", URL: "http://127.0.0.1:1"}}},
		Tracker: role.Endpoint{URL: "http://127.0.0.1:1"}, BuildIndex: role.Endpoint{URL: s.URL},
	})
	b.serve(manifestOf("old"), nil)
	if status, body, _ := r.tag(); status != http.StatusOK || body != manifestOf("old") {
		t.Fatalf("%d %s", status, body)
	}
	b.serve(manifestOf("new"), later(2500*time.Millisecond)) // longer than it takes to try a connection
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if status, body, warning := r.tag(); status != http.StatusOK || body != manifestOf("new") || warning != "" {
				t.Errorf("a slow build-index moved the tag; the agent says %d %s, Warning %q", status, body, warning)
			}
		})
	}
	wg.Wait()
	if b.asked > 2 { // who comes just after the answer asks again
		t.Errorf("build-index was asked %d times by 8 askers of one moment", b.asked)
	}
}

// What is unreachable, or answers nothing at all, is answered for with the last known digest and a warning.
func TestUnreachableBuildIndex(t *testing.T) {
	for name, tc := range map[string]struct {
		wait    func(*http.Request) bool
		warning string
	}{
		"hangs":      {later(time.Hour), "did not answer in time"},
		"breaks off": {func(*http.Request) bool { panic(http.ErrAbortHandler) }, "is unreachable"},
	} {
		t.Run(name, func(t *testing.T) {
			b := &manifests{}
			s := httptest.NewServer(b)
			t.Cleanup(s.Close)
			t.Cleanup(http.DefaultClient.CloseIdleConnections)
			r := startWith(t, Config{
				Config:  role.Config{Origins: []ring.Member{{ID: "o", URL: "http://127.0.0.1:1"}}},
				Tracker: role.Endpoint{URL: "http://127.0.0.1:1"}, BuildIndex: role.Endpoint{URL: s.URL},
				BuildIndexWait: config.Duration(200 * time.Millisecond)})
			b.serve(manifestOf("old"), nil)
			r.tag()
			b.serve(manifestOf("new"), tc.wait)
			if status, body, warning := r.tag(); status != http.StatusOK || body != manifestOf("old") || !strings.Contains(warning, tc.warning) {
				t.Errorf("%d %s, Warning %q; want the last known digest and %q", status, body, warning, tc.warning)
			}
		})
	}
}

// askIn asks in virtual time and returns why build-index counts as unreachable, and after how long.
func askIn(x *indexHealth, question func(context.Context) error) (took time.Duration, unreachable error) {
	began := time.Now()
	_, unreachable = x.ask(context.Background(), question)
	return time.Since(began), unreachable
}

func hanging(ctx context.Context) error {
	<-ctx.Done()
	return fmt.Errorf("%w: %w", registry.ErrUnavailable, context.Cause(ctx))
}

func answeredAfter(d time.Duration, err error) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-time.After(d):
			return err
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", registry.ErrUnavailable, context.Cause(ctx))
		}
	}
}

// testIndex has a network that works while up says so; where it does not, a connection is tried for a second.
func testIndex(up *atomic.Bool) *indexHealth {
	return &indexHealth{patience: 10 * time.Second, dial: func(context.Context, string, string) (net.Conn, error) {
		if !up.Load() {
			time.Sleep(time.Second)
			return nil, errors.New("no route")
		}
		c, other := net.Pipe()
		other.Close()
		return c, nil
	}}
}

func TestPatienceWithBuildIndex(t *testing.T) {
	for name, tc := range map[string]struct {
		question func(context.Context) error
		down     bool
		want     error
		least    time.Duration
		most     time.Duration
	}{
		"answers late":            {answeredAfter(9*time.Second, nil), false, nil, 9 * time.Second, 9 * time.Second},
		"says 404 late":           {answeredAfter(9*time.Second, registry.ErrManifestUnknown), false, nil, 9 * time.Second, 9 * time.Second},
		"hangs":                   {hanging, false, errSilent, 10 * time.Second, 11 * time.Second},
		"hangs, no connections":   {hanging, true, errNotConnected, 2 * time.Second, 2 * time.Second},
		"fails":                   {answeredAfter(0, registry.ErrInternal), false, errNotConnected, 0, 0},
		"is slow, no connections": {answeredAfter(9*time.Second, nil), true, errNotConnected, 2 * time.Second, 2 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var up atomic.Bool
				up.Store(!tc.down)
				took, got := askIn(testIndex(&up), tc.question)
				if !errors.Is(got, tc.want) || tc.want == nil && got != nil {
					t.Errorf("counts as unreachable: %v, want %v", got, tc.want)
				}
				if took < tc.least || took > tc.most {
					t.Errorf("took %s, want %s to %s", took, tc.least, tc.most)
				}
			})
		})
	}
}

// What hangs costs its patience once, not with each manifest of an image. The first answer ends that.
func TestSilentBuildIndexCostsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up atomic.Bool
		up.Store(true)
		x := testIndex(&up)
		askIn(x, hanging)
		if took, got := askIn(x, hanging); took != silentPatience || !errors.Is(got, errSilent) {
			t.Errorf("the second question took %s and ended with %v, want %s", took, got, silentPatience)
		}
		if _, got := askIn(x, answeredAfter(0, nil)); got != nil {
			t.Errorf("answered, and %v", got)
		}
		if took, got := askIn(x, answeredAfter(9*time.Second, nil)); got != nil {
			t.Errorf("it answered meanwhile, is slow, and counts as unreachable after %s: %v", took, got)
		}
		askIn(x, hanging)
		time.Sleep(11 * time.Second)
		if _, got := askIn(x, answeredAfter(9*time.Second, nil)); got != nil {
			t.Errorf("slow a while after it hung: %v, want its answer", got)
		}
	})
}
