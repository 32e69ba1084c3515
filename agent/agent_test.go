package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/origin/swarm"
	"kraken/proto/announce"
	"kraken/proto/config"
	"kraken/proto/ring"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// TestTrackerIsTold: what an agent holds and has used is announced, what is evicted is taken back at once, and all of
// it when the agent ends.
func TestTrackerIsTold(t *testing.T) {
	var mu sync.Mutex
	believed := map[digest.Digest]bool{}
	evicted := map[digest.Digest]int{}
	heard := make(chan struct{}, 1)
	tracker := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		req, err := announce.ParseRequest(body)
		if err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, s := range req.Blobs {
			if s.Event == announce.EventStopped {
				delete(believed, s.Digest)
				evicted[s.Digest]++
			} else {
				believed[s.Digest] = true
			}
		}
		select {
		case heard <- struct{}{}:
		default:
		}
		if err := json.NewEncoder(w).Encode(announce.Response{Version: announce.Version, Interval: time.Second}); err != nil {
			t.Error(err)
		}
	}))
	defer tracker.Close()

	const size = 2 << 20
	nowhere := "http://127.0.0.1:1"
	a, err := New(Config{
		Config: role.Config{Server: transport.ServerConfig{Listen: "127.0.0.1:0"}, Origins: []ring.Member{{ID: "o", URL: nowhere}}},
		Names:  []string{"kraken.example"}, BuildIndex: role.Endpoint{URL: nowhere}, Tracker: role.Endpoint{URL: tracker.URL}, Peer: Peer{Listen: "127.0.0.1:0", StockPeers: true, Rates: swarm.Rates{}},
		Cache: Cache{Dir: t.TempDir(), Capacity: config.Size(3*size + size/2)},
	}, role.Deps{Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	a.announcer.interval = time.Second // as the tracker would say, which hears nothing while there is nothing to be announced
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	fetch := func(seed byte) digest.Digest {
		b := make([]byte, size)
		rand.NewChaCha8([32]byte{seed}).Read(b)
		d := digest.FromBytes(b)
		if _, err := a.store.Ingest(ctx, d, size, bytes.NewReader(b), nil); err != nil {
			t.Fatal(err)
		}
		m, err := a.store.Metainfo(d)
		if err != nil {
			t.Fatal(err)
		}
		a.swarm.Register(m)
		return d
	}
	await := func(what string, check func() bool) {
		t.Helper()
		limit := time.After(20 * time.Second)
		for {
			mu.Lock()
			ok := check()
			mu.Unlock()
			if ok {
				return
			}
			select {
			case <-heard:
			case <-limit:
				t.Fatalf("%s: the tracker believes %v", what, believed)
			}
		}
	}
	first, second := fetch(1), fetch(2)
	await("both are announced", func() bool { return believed[first] && believed[second] })
	third, fourth := fetch(3), fetch(4) // there is room for three
	await("the oldest is taken back", func() bool { return evicted[first] > 0 && !believed[first] })
	await("the last ones are announced", func() bool { return believed[third] && believed[fourth] })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(believed) > 0 {
		t.Errorf("the agent has ended, and the tracker believes %v", believed)
	}
}
