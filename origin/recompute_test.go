package origin

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/origin/bucket"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/proto/role"
)

// alone runs a cluster of one origin and returns it with a client. What change says is configured beside.
func alone(t *testing.T, change ...func(*Config)) (*Origin, *cluster.OriginClient) {
	t.Helper()
	dir := t.TempDir()
	cfg := Config{
		ID: "origin-01", Dir: filepath.Join(dir, "state"),
		Buckets: []bucket.Config{{Name: "main", URL: "file://" + filepath.Join(dir, "bucket")}},
	}
	cfg.Replicas, cfg.Origins = 1, []ring.Member{{ID: "origin-01", URL: "http://127.0.0.1:1"}}
	cfg.Server.Listen, cfg.Peer.Listen = "127.0.0.1:0", "127.0.0.1:0"
	if err := os.MkdirAll(filepath.Join(dir, "bucket"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range change {
		f(&cfg)
	}
	o, err := New(cfg, role.Deps{Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- o.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	hc := &http.Client{Transport: &http.Transport{}}
	t.Cleanup(hc.CloseIdleConnections)
	c, err := cluster.NewOriginClient("http://"+o.Addr(), hc)
	if err != nil {
		t.Fatal(err)
	}
	return o, c
}

// until waits until something is so, and fails with what is wrong while it is not.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

// TestDoubtedMetainfo: who says again and again that a metainfo is wrong makes the origin read the blob once, and
// disconnects nobody; a wrong metainfo is replaced.
func TestDoubtedMetainfo(t *testing.T) {
	o, c := alone(t)
	content := bytes.Repeat([]byte("a layer "), 1<<17)
	d := digest.FromBytes(content)
	if err := c.Replicate(t.Context(), "r", d, int64(len(content)), false, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	right, err := o.metainfo(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	wrong, err := blob.NewMetainfo(d, right.Size, bytes.Repeat([]byte{7}, 20*right.NumPieces()))
	if err != nil {
		t.Fatal(err)
	}
	if err := o.store.PutMetainfo(wrong); err != nil {
		t.Fatal(err)
	}
	doubt := func() {
		t.Helper()
		if err := c.VerifyMetainfo(t.Context(), "r", d); err != nil {
			t.Fatal(err)
		}
	}
	doubt()
	until(t, "a wrong metainfo stays", func() bool {
		m, err := o.store.Metainfo(d)
		return err == nil && m.InfoHash() == right.InfoHash() && o.swarm.Seeds(d)
	})
	// What is doubted again within a minute is not looked at: this wrong one would be noticed.
	until(t, "the first recomputation does not end", func() bool {
		o.recomputing.mu.Lock()
		defer o.recomputing.mu.Unlock()
		return o.recomputing.running == 0
	})
	if err := o.store.PutMetainfo(wrong); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		doubt()
		if !o.swarm.Seeds(d) {
			t.Fatal("peers were disconnected by a claim")
		}
	}
	o.recomputing.mu.Lock()
	running := o.recomputing.running
	o.recomputing.mu.Unlock()
	if m, err := o.store.Metainfo(d); err != nil || m.InfoHash() != wrong.InfoHash() || running != 0 {
		t.Errorf("recomputed at each claim: %v, %d running", err, running)
	}
	if err := c.VerifyMetainfo(t.Context(), "r", digest.FromString("not here")); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("a blob that is not there: %v, want ErrBlobUnknown", err)
	}
}

func TestRecomputationsAreFew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRecomputations()
		a, b, c := digest.FromString("a"), digest.FromString("b"), digest.FromString("c")
		if !r.begin(a, "one") || !r.begin(b, "two") || r.begin(c, "three") {
			t.Errorf("want %d at once", maxRecomputing)
		}
		r.done()
		if r.begin(a, "three") {
			t.Error("the same one again at once")
		}
		if r.begin(c, "one") {
			t.Error("another one for a source that has just had its turn")
		}
		if !r.begin(c, "three") {
			t.Error("one that had to wait is not recomputed when there is room")
		}
		r.done()
		r.done()
		time.Sleep(recomputeEvery)
		if !r.begin(a, "one") {
			t.Error("never again")
		}
		for range 2 * maxRecomputed {
			r.begin(digest.FromString(time.Now().String()), time.Now().String())
			time.Sleep(time.Millisecond)
		}
		if r.begin(a, "one"); r.last.Len() > maxRecomputed || r.sources.Len() > maxRecomputed {
			t.Errorf("%d are remembered", r.last.Len())
		}
	})
}
