package origin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/origin/bucket"
	"kraken/origin/store"
	"kraken/proto/layout"
	"kraken/proto/ring"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// heads is a bucket that is only asked what it has.
type heads struct {
	bucket.Bucket
	stat  func(ctx context.Context, key string) (bucket.Object, error)
	asked atomic.Int64
}

func (h *heads) Stat(ctx context.Context, key string) (bucket.Object, error) {
	if key == layout.ProbeKey {
		return bucket.Object{}, bucket.ErrNotFound
	}
	h.asked.Add(1)
	return h.stat(ctx, key)
}

// withBuckets is an origin without others that has a store and buckets, and no listeners. A repository's bucket is that
// whose name it begins with.
func withBuckets(t *testing.T, buckets map[string]bucket.Bucket) *Origin {
	t.Helper()
	o := &Origin{log: slog.New(slog.DiscardHandler), checks: make(chan struct{}, 2), kick: make(chan struct{}, 1)}
	o.cfg.ID, o.cfg.WritebackWorkers = "a", 1
	var cfgs []bucket.Config
	for name, b := range buckets {
		cfgs = append(cfgs, bucket.Config{Name: name, URL: "mem://", Driver: b, Repositories: name + ".*"})
	}
	err := role.Open(role.Config{Role: transport.RoleOrigin, Origins: []ring.Member{{ID: "a", URL: "http://127.0.0.1:1"}}, Replicas: 1},
		role.Deps{Log: o.log, Registry: prometheus.NewRegistry()}, time.Second, func(c *role.Chassis) (err error) {
			o.Chassis, o.origins, o.m = c, c.Origins, newMetrics(c.Registry, o)
			if o.durable, err = lru.New[string, bool](1000); err != nil {
				return err
			}
			if o.store, err = store.Open(store.Config{Dir: t.TempDir()}); err != nil {
				return err
			}
			<-o.store.Scanned()
			o.buckets, err = bucket.OpenAll(t.Context(), cfgs, nil)
			o.monitor = bucket.NewMonitor(o.buckets, layout.ProbeKey, o.log, func() int { return 0 }, func() {})
			return err
		})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(o.Chassis.Close(), o.store.Close()); err != nil {
			t.Error(err)
		}
	})
	return o
}

func digests(n int) (ds []digest.Digest) {
	for i := range n {
		ds = append(ds, digest.FromString(fmt.Sprint(i)))
	}
	return ds
}

// What a bucket takes longer to answer than a question lasts is known a while after the first question; it is asked
// once for all who ask meanwhile.
func TestDurableInASlowBucket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ds := digests(100)
		b := &heads{stat: func(ctx context.Context, key string) (bucket.Object, error) {
			select {
			case <-time.After(1500 * time.Millisecond):
			case <-ctx.Done():
				return bucket.Object{}, fmt.Errorf("%w: %w", bucket.ErrUnavailable, ctx.Err())
			}
			i := slices.IndexFunc(ds, func(d digest.Digest) bool { return layout.BlobKey(d) == key })
			return bucket.Object{Key: key, Size: 1, Digest: ds[i]}, nil
		}}
		o := withBuckets(t, map[string]bucket.Bucket{"b": b})
		for range 10 {
			began := time.Now()
			out, err := o.durableIn(t.Context(), "b/repo", ds)
			if err != nil || len(out.Durable)+len(out.Unknown) != len(ds) {
				t.Fatalf("%d durable, %d unknown of %d, %v", len(out.Durable), len(out.Unknown), len(ds), err)
			}
			if took := time.Since(began); took > time.Second {
				t.Errorf("the answer took %v", took)
			}
			if len(out.Unknown) > 0 {
				time.Sleep(500 * time.Millisecond)
				continue
			}
			if n := b.asked.Load(); n != int64(len(ds)) {
				t.Errorf("the bucket was asked %d times about %d blobs", n, len(ds))
			}
			return
		}
		t.Error("not all is known after ten questions")
	})
}

// An object that the bucket refuses to tell of is unknown; the others are not.
func TestDurableBesideOneThatIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ds := digests(40)
		b := &heads{stat: func(ctx context.Context, key string) (bucket.Object, error) {
			i := slices.IndexFunc(ds, func(d digest.Digest) bool { return layout.BlobKey(d) == key })
			if i == 3 {
				return bucket.Object{}, fmt.Errorf("%w: %w", bucket.ErrUnavailable, bucket.ErrDenied)
			}
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
				return bucket.Object{}, fmt.Errorf("%w: %w", bucket.ErrUnavailable, ctx.Err())
			}
			return bucket.Object{Key: key, Size: 1, Digest: ds[i]}, nil
		}}
		out, err := withBuckets(t, map[string]bucket.Bucket{"b": b}).durableIn(t.Context(), "b/repo", ds)
		if err != nil || len(out.Durable) != len(ds)-1 || !slices.Equal(out.Unknown, ds[3:4]) {
			t.Errorf("%d durable, unknown %v, %v", len(out.Durable), out.Unknown, err)
		}
	})
}
