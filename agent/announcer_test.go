package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/announce"
	"kraken/proto/blob"
	"kraken/proto/transport"
)

// notebook is a tracker that keeps what it was told, and when.
type notebook struct {
	began time.Time

	mu       sync.Mutex
	down     bool
	requests []announce.Request
	at       []time.Duration
	believed map[digest.Digest]announce.BlobState
}

func (t *notebook) Announce(_ context.Context, r announce.Request) (announce.Response, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.down {
		return announce.Response{}, announce.ErrUnavailable
	}
	if err := r.Validate(); err != nil {
		return announce.Response{}, err
	}
	t.requests, t.at = append(t.requests, r), append(t.at, time.Since(t.began))
	out := announce.Response{Version: 1, Interval: 10 * time.Second}
	for _, s := range r.Blobs {
		if s.Event == announce.EventStopped {
			delete(t.believed, s.Digest)
			continue
		}
		t.believed[s.Digest] = s
		if s.Want {
			out.Blobs = append(out.Blobs, announce.BlobAnswer{Digest: s.Digest, Peers: []announce.Peer{{ID: id, Addr: []string{"10.0.0.1:16062"}}}})
		}
	}
	return out, nil
}

const id = "2d4b4e303030312d000000000000000000000000"

// restart loses all, as a tracker's restart does.
func (t *notebook) restart(down bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.down, t.believed = down, map[digest.Digest]announce.BlobState{}
}

// since are the requests after a time.
func (t *notebook) since(d time.Duration) (out []announce.Request) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, r := range t.requests {
		if t.at[i] >= d {
			out = append(out, r)
		}
	}
	return out
}

func (t *notebook) believes(d digest.Digest) (announce.BlobState, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s, ok := t.believed[d]
	return s, ok
}

// node is what an agent holds and fetches.
type node struct {
	mu       sync.Mutex
	held     []store.Info
	fetching []announce.BlobState
	young    bool
	fed      int
}

func (n *node) lately() []store.Info {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.held)
}

func (n *node) downloads() ([]announce.BlobState, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.fetching), n.young
}

func (n *node) bytesSent() map[digest.Digest]int64 { return nil }

func (n *node) addPeers(_ digest.Digest, peers []swarm.Peer) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.fed += len(peers)
}

func (n *node) set(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
}

type errorCount int

func (c *errorCount) Inc() { *c++ }

func named(i int) store.Info {
	return store.Info{Digest: digest.FromString(fmt.Sprint(i)), Size: 1 << 30}
}

// announces runs an announcer in a bubble, with a clock of its own.
func announces(t *testing.T, held int, test func(t *testing.T, a *announcer, n *node, tr *notebook, stop func())) {
	synctest.Test(t, func(t *testing.T) {
		tr := &notebook{began: time.Now(), believed: map[digest.Digest]announce.BlobState{}}
		n := &node{}
		for i := range held {
			n.held = append(n.held, named(i))
		}
		var errs errorCount
		a := newAnnouncer(n, tr, announce.Peer{ID: id, Addr: []string{"10.0.0.2:16062"}}, slog.New(slog.DiscardHandler), &errs)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- a.run(ctx) }()
		stopped := false
		stop := func() {
			stopped = true
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		pass(time.Second)
		test(t, a, n, tr, stop)
		if !stopped {
			stop()
		}
	})
}

func TestOneRequestAnInterval(t *testing.T) {
	announces(t, 300, func(t *testing.T, _ *announcer, _ *node, tr *notebook, _ func()) {
		pass(100 * time.Second)
		all := tr.since(0)
		if len(all) < 9 || len(all) > 11 {
			t.Errorf("%d requests in 101 s, want one each 10 to 11 s", len(all))
		}
		for _, r := range all {
			if len(r.Blobs) != 300 {
				t.Errorf("%d blobs in one request, want all 300", len(r.Blobs))
			}
		}
		var gaps []time.Duration
		for i := range tr.at[1:] {
			gaps = append(gaps, tr.at[i+1]-tr.at[i])
		}
		if slices.Min(gaps) < 10*time.Second || slices.Max(gaps) > 11*time.Second || slices.Min(gaps) == slices.Max(gaps) {
			t.Errorf("times between are %v, want 10 to 11 s, and not always the same", gaps)
		}
	})
}

func TestNewDownloadsAndEventsDontWait(t *testing.T) {
	announces(t, 3, func(t *testing.T, a *announcer, n *node, tr *notebook, _ func()) {
		began := time.Since(tr.began)
		answer, err := a.ask(t.Context(), announce.BlobState{Digest: named(7).Digest, Left: announce.LeftUnknown, Want: true, Event: announce.EventStarted})
		if err != nil || len(answer.Peers) != 1 || time.Since(tr.began) != began {
			t.Errorf("a new download: %+v, %v", answer, err)
		}
		n.set(func() {
			n.fetching, n.young = []announce.BlobState{{Digest: named(7).Digest, Size: 1 << 30, Left: 5, Want: true}}, true
		})
		a.wake()
		pass(8 * time.Second)
		if k := len(tr.since(began)); k < 4 || k > 6 {
			t.Errorf("%d requests in 8 s of a young download, want one each two seconds", k)
		}
		if n.fed == 0 {
			t.Error("the peers of the answers were not fed to the download")
		}
		n.set(func() { n.fetching, n.young = nil, false })
		pass(5 * time.Second)
		began = time.Since(tr.began)
		for i := range 50 { // many at once share a request
			a.completed("repo", &blob.Metainfo{Digest: named(100 + i).Digest, Size: 1 << 30}, 1)
		}
		pass(2 * minGap)
		events := tr.since(began)
		if len(events) == 0 || len(events) > 2 {
			t.Fatalf("50 completed downloads took %d requests", len(events))
		}
		if s, ok := tr.believes(named(149).Digest); !ok || s.Left != 0 || s.Event != announce.EventCompleted {
			t.Errorf("the tracker believes %+v, %v of a completed blob", s, ok)
		}
	})
}

func TestStoppedAtEvictionAndAtTheEnd(t *testing.T) {
	announces(t, 1000, func(t *testing.T, a *announcer, n *node, tr *notebook, stop func()) {
		n.set(func() { n.held = n.held[1:] })
		a.gone(named(0).Digest)
		a.gone(digest.FromString("never announced"))
		pass(time.Second)
		if _, ok := tr.believes(named(0).Digest); ok {
			t.Error("the tracker hands out a blob that was evicted")
		}
		if last := tr.requests[len(tr.requests)-1]; len(last.Blobs) != 1 {
			t.Errorf("%d blobs in the request of an eviction, want one", len(last.Blobs))
		}
		stop()
		if len(tr.believed) > 0 {
			t.Errorf("the tracker still believes %d blobs after the end", len(tr.believed))
		}
	})
}

// TestEvictedJustBeforeTheEnd: the request of an eviction is not yet sent when the agent ends.
func TestEvictedJustBeforeTheEnd(t *testing.T) {
	announces(t, 3, func(t *testing.T, a *announcer, n *node, tr *notebook, stop func()) {
		a.gone(named(2).Digest)
		pass(minGap / 2) // sent; what comes now waits for the gap
		a.gone(named(0).Digest)
		if _, ok := tr.believes(named(0).Digest); !ok {
			t.Fatal("the eviction was sent at once, and this test shows nothing")
		}
		stop()
		if len(tr.believed) > 0 {
			t.Errorf("the tracker still believes %v after the end", tr.believed)
		}
	})
}

func TestWhatIsNotUsedFadesAway(t *testing.T) {
	announces(t, 10, func(t *testing.T, a *announcer, n *node, tr *notebook, _ func()) {
		n.set(func() { n.held = n.held[:4] })
		pass(15 * time.Second)
		if last := tr.requests[len(tr.requests)-1]; len(last.Blobs) != 4 {
			t.Errorf("%d blobs are announced, want the 4 that were used lately", len(last.Blobs))
		}
		if len(a.told) != 4 {
			t.Errorf("%d are remembered", len(a.told))
		}
	})
}

func TestTrackerRestarts(t *testing.T) {
	announces(t, 5, func(t *testing.T, a *announcer, n *node, tr *notebook, _ func()) {
		tr.restart(false) // too fast to be noticed
		pass(12 * time.Second)
		if len(tr.believed) != 5 {
			t.Errorf("%d blobs are known again after an interval, want 5", len(tr.believed))
		}
		tr.restart(true)
		a.completed("repo", &blob.Metainfo{Digest: named(50).Digest, Size: 1 << 30}, 1)
		a.gone(named(3).Digest)
		n.set(func() { n.held = slices.Delete(n.held, 3, 4) })
		pass(time.Minute)
		if !errors.Is(a.state(), announce.ErrUnavailable) {
			t.Errorf("the state is %v", a.state())
		}
		tr.restart(false)
		back := time.Since(tr.began)
		pass(11 * time.Second)
		if len(tr.since(back)) == 0 || len(tr.believed) < 4 {
			t.Fatalf("back for 11 s, the tracker knows %d blobs", len(tr.believed))
		}
		if s, ok := tr.believes(named(50).Digest); !ok || s.Event != announce.EventCompleted {
			t.Errorf("the event of the time without a tracker is lost: %+v", s)
		}
		if _, ok := tr.believes(named(3).Digest); ok {
			t.Error("what was evicted without a tracker is announced")
		}
	})
}

// pass lets time go by, and all that is to happen in it happen.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// TestAnnouncesFromItsAddress: the tracker is reached also by a node that advertises an address which this machine does
// not have.
func TestAnnouncesFromItsAddress(t *testing.T) {
	var seen string
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen = r.RemoteAddr }))
	defer srv.Close()
	// the last two are nobody's here
	for _, addr := range []string{"127.0.0.1:16062", "192.0.2.1:16062", "[::ffff:192.0.2.1]:16062"} {
		hc, err := trackerClient(transport.ClientConfig{}, []string{addr}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := hc.Get(srv.URL)
		if err != nil {
			t.Fatalf("%s: %v", addr, err)
		}
		resp.Body.Close()
		hc.CloseIdleConnections()
		if !strings.HasPrefix(seen, "127.0.0.1:") {
			t.Errorf("%s: seen at %s", addr, seen)
		}
	}
}

// TestTrackerWarns: a warning of the tracker is logged once, however often it comes.
func TestTrackerWarns(t *testing.T) {
	var out bytes.Buffer
	var errs errorCount
	a := newAnnouncer(&node{}, warning("nobody is given this address"), announce.Peer{ID: id}, slog.New(slog.NewTextHandler(&out, nil)), &errs)
	for range 3 {
		if _, err := a.send(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
	}
	if n := strings.Count(out.String(), "nobody is given this address"); n != 1 {
		t.Errorf("logged %d times: %s", n, &out)
	}
}

type warning string

// Announce implements announcing.
func (w warning) Announce(context.Context, announce.Request) (announce.Response, error) {
	return announce.Response{Version: announce.Version, Warning: string(w)}, nil
}
