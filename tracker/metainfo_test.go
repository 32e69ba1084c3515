package tracker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/blob"
	"kraken/proto/registry"
)

// fakeOrigin answers after a while, with what it has.
type fakeOrigin struct {
	after   time.Duration
	linger  time.Duration // after it was told to stop
	err     error
	blobs   map[digest.Digest]*blob.Metainfo
	asked   atomic.Int64
	working atomic.Int64
}

func (o *fakeOrigin) Metainfo(ctx context.Context, _ string, d digest.Digest) (*blob.Metainfo, error) {
	o.asked.Add(1)
	o.working.Add(1)
	defer o.working.Add(-1)
	select {
	case <-time.After(o.after):
	case <-ctx.Done():
		time.Sleep(o.linger)
		return nil, fmt.Errorf("%w: %w", registry.ErrUnavailable, ctx.Err())
	}
	if o.err != nil {
		return nil, o.err
	}
	if m := o.blobs[d]; m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("%w: %s", registry.ErrBlobUnknown, d)
}

func metainfoOf(t testing.TB, content string) *blob.Metainfo {
	t.Helper()
	h := blob.NewPieceHasher(int64(len(content)))
	if _, err := h.Write([]byte(content)); err != nil {
		t.Fatal(err)
	}
	m, err := h.Sum(digest.FromString(content))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func holding(ms ...*blob.Metainfo) map[digest.Digest]*blob.Metainfo {
	out := map[digest.Digest]*blob.Metainfo{}
	for _, m := range ms {
		out[m.Digest] = m
	}
	return out
}

// cacheOver gives a cache that is running, and ends it with the test.
func cacheOver(t *testing.T, limit int64, origins ...*fakeOrigin) *metainfos {
	t.Helper()
	c, err := newMetainfos(func(digest.Digest) []asker {
		out := make([]asker, len(origins))
		for i, o := range origins {
			out[i] = o
		}
		return out
	}, limit, slog.New(slog.DiscardHandler), newMetrics(prometheus.NewRegistry()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- c.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return c
}

func TestOneFetchForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := metainfoOf(t, "content")
		o := &fakeOrigin{after: 100 * time.Millisecond, blobs: holding(m)}
		c := cacheOver(t, 1<<20, o)
		results := make(chan error)
		for range 50 {
			go func() {
				i, err := c.get(t.Context(), question{"r", m.Digest}, sourceKey{})
				if err == nil && (i.hash != m.InfoHash() || i.size != m.Size || string(i.encoded) != string(m.Marshal())) {
					err = errors.New("another metainfo")
				}
				results <- err
			}()
		}
		for range 50 {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
		if n := o.asked.Load(); n != 1 {
			t.Errorf("the origin was asked %d times", n)
		}
		if i, ok := c.find(m.InfoHash()); !ok || i.digest != m.Digest {
			t.Error("it is not found by its info-hash")
		}
	})
}

// TestBudget: an asker gives up, the fetch goes on, the next asker has it.
func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := metainfoOf(t, "content")
		c := cacheOver(t, 1<<20, &fakeOrigin{after: 3 * time.Second, blobs: holding(m)})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if _, err := c.get(ctx, question{"r", m.Digest}, sourceKey{}); !errors.Is(err, registry.ErrUnavailable) || time.Since(began) != time.Second {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		time.Sleep(2500 * time.Millisecond)
		if _, ok := c.cached("r", m.Digest); !ok {
			t.Error("the fetch did not go on")
		}
	})
}

func TestOrder(t *testing.T) {
	m := metainfoOf(t, "content")
	unavailable := fmt.Errorf("%w: refused", registry.ErrUnavailable)
	for name, c := range map[string]struct {
		origins []*fakeOrigin
		want    error
		within  time.Duration
		asked   []int64
	}{
		"the best has it":   {[]*fakeOrigin{{blobs: holding(m)}, {blobs: holding(m)}}, nil, 0, []int64{1, 0}},
		"the best is down":  {[]*fakeOrigin{{err: unavailable}, {blobs: holding(m)}}, nil, 0, []int64{1, 1}},
		"the best hangs":    {[]*fakeOrigin{{after: time.Hour}, {blobs: holding(m)}}, nil, hedgeAfter, []int64{1, 1}},
		"two hang":          {[]*fakeOrigin{{after: time.Hour}, {after: time.Hour}, {blobs: holding(m)}}, nil, 2 * hedgeAfter, []int64{1, 1, 1}},
		"the best is slow":  {[]*fakeOrigin{{after: 300 * time.Millisecond, blobs: holding(m)}, {after: time.Hour}}, nil, 300 * time.Millisecond, []int64{1, 1}},
		"nobody has it":     {[]*fakeOrigin{{}, {blobs: holding(m)}}, registry.ErrBlobUnknown, 0, []int64{1, 0}},
		"down and unknown":  {[]*fakeOrigin{{err: unavailable}, {}}, registry.ErrBlobUnknown, 0, []int64{1, 1}},
		"all are down":      {[]*fakeOrigin{{err: unavailable}, {err: unavailable}}, registry.ErrUnavailable, 0, []int64{1, 1}},
		"all hang":          {[]*fakeOrigin{{after: time.Hour}, {after: time.Hour}}, registry.ErrUnavailable, fetchTimeout, []int64{1, 1}},
		"there is none":     {nil, registry.ErrUnavailable, 0, nil},
		"down, then a hang": {[]*fakeOrigin{{err: unavailable}, {after: time.Hour}, {blobs: holding(m)}}, nil, hedgeAfter, []int64{1, 1, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				i, err := cacheOver(t, 1<<20, c.origins...).get(t.Context(), question{"r", m.Digest}, sourceKey{})
				if !errors.Is(err, c.want) || (err == nil) != (i != nil) {
					t.Errorf("got %v, want %v", err, c.want)
				}
				if took := time.Since(began); took != c.within {
					t.Errorf("took %s, want %s", took, c.within)
				}
				for i, o := range c.origins {
					if n := o.asked.Load(); n != c.asked[i] {
						t.Errorf("origin %d was asked %d times, want %d", i, n, c.asked[i])
					}
				}
			})
		})
	}
}

func TestNegative(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := metainfoOf(t, "content")
		o := &fakeOrigin{blobs: holding()}
		c := cacheOver(t, 1<<20, o)
		for range 10 {
			if _, err := c.get(t.Context(), question{"r", m.Digest}, sourceKey{}); !errors.Is(err, registry.ErrBlobUnknown) {
				t.Fatal(err)
			}
		}
		if n := o.asked.Load(); n != 1 {
			t.Errorf("asked %d times for what was just unknown", n)
		}
		if _, err := c.get(t.Context(), question{"other", m.Digest}, sourceKey{}); err == nil || o.asked.Load() != 2 {
			t.Error("another repository, another bucket: it was not asked")
		}
		o.blobs = holding(m) // it is pushed
		time.Sleep(negativeFor * 5 / 4)
		if _, err := c.get(t.Context(), question{"r", m.Digest}, sourceKey{}); err != nil {
			t.Errorf("%s later it is still unknown: %v", negativeFor, err)
		}
		if negativeFor > time.Second {
			t.Errorf("failures are remembered for %s", negativeFor)
		}
	})
}

// TestRefresh: a metainfo that an origin corrects, or a blob that goes, is noticed; an outage is not.
func TestRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wrong, right := metainfoOf(t, "wrong"), metainfoOf(t, "right")
		d := right.Digest
		wrong.Digest = d
		o := &fakeOrigin{blobs: map[digest.Digest]*blob.Metainfo{d: wrong}}
		c := cacheOver(t, 1<<20, o)
		after := func(wait time.Duration) *info {
			t.Helper()
			time.Sleep(wait)
			_, _ = c.get(t.Context(), question{"r", d}, sourceKey{}) // an old one is still given, and fetched again
			synctest.Wait()
			i, err := c.get(t.Context(), question{"r", d}, sourceKey{})
			if err != nil {
				t.Fatal(err)
			}
			return i
		}
		first := after(0)
		o.blobs[d] = right
		if i := after(refreshAfter); i != first || o.asked.Load() != 1 {
			t.Error("fetched again too early")
		}
		second := after(1)
		if second.hash == first.hash {
			t.Error("the wrong metainfo is given for ever")
		}
		if _, ok := c.find(first.hash); ok {
			t.Error("the wrong info-hash is known for ever")
		}
		o.err = registry.ErrUnavailable
		if i := after(refreshAfter + 1); i.hash != second.hash {
			t.Error("an outage of the origins lost a metainfo")
		}
		o.err, o.blobs = nil, nil
		time.Sleep(refreshAfter + 1)
		_, _ = c.get(t.Context(), question{"r", d}, sourceKey{})
		synctest.Wait()
		if _, err := c.get(t.Context(), question{"r", d}, sourceKey{}); !errors.Is(err, registry.ErrBlobUnknown) {
			t.Errorf("a deleted blob's metainfo is given: %v", err)
		}
	})
}

func TestMetainfoMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var all []*blob.Metainfo
		for i := range 20 {
			all = append(all, metainfoOf(t, fmt.Sprintf("content %02d", i)))
		}
		each := int64(len(all[0].Marshal())) + infoOverhead
		c := cacheOver(t, 5*each+1, &fakeOrigin{blobs: holding(all...)})
		for _, m := range all {
			if _, err := c.get(t.Context(), question{"r", m.Digest}, sourceKey{}); err != nil {
				t.Fatal(err)
			}
			if _, ok := c.cached("r", all[0].Digest); !ok { // used all the time
				t.Fatal("the one that is used most was dropped")
			}
		}
		if c.bytes() != 5*each || c.known.Len() != 5 || len(c.byHash) != 5 {
			t.Errorf("%d bytes, %d, %d by info-hash, want %d, 5, 5", c.bytes(), c.known.Len(), len(c.byHash), 5*each)
		}
		small := cacheOver(t, 10, &fakeOrigin{blobs: holding(all...)})
		if _, err := small.get(t.Context(), question{"r", all[0].Digest}, sourceKey{}); err != nil || small.bytes() != 0 {
			t.Errorf("one that is too large to keep: %v, %d bytes", err, small.bytes())
		}
	})
}

func TestFetchesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &fakeOrigin{after: time.Second, blobs: holding()}
		c := cacheOver(t, 1<<20, o)
		answers := make(chan error)
		for i := range maxFetching + 1 {
			go func() {
				_, err := c.get(t.Context(), question{"r", digest.FromString(fmt.Sprint(i))}, sourceKey{})
				answers <- err
			}()
			synctest.Wait()
		}
		if err := <-answers; !errors.Is(err, registry.ErrUnavailable) { // at once: nothing else is done yet
			t.Errorf("one too many: %v", err)
		}
		if n := o.asked.Load(); n != maxAtOnce {
			t.Errorf("%d questions at once, want %d", n, maxAtOnce)
		}
		for range maxFetching {
			if err := <-answers; !errors.Is(err, registry.ErrBlobUnknown) {
				t.Error(err)
			}
		}
	})
}

func TestEndWaitsForFetches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &fakeOrigin{after: time.Hour, linger: time.Millisecond}
		c, err := newMetainfos(func(digest.Digest) []asker { return []asker{o} }, 1, slog.New(slog.DiscardHandler), newMetrics(prometheus.NewRegistry()))
		if err != nil {
			t.Fatal(err)
		}
		got := make(chan error, 1)
		go func() {
			_, err := c.get(context.Background(), question{"r", theBlob}, sourceKey{})
			got <- err
		}()
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := c.run(ctx); err != nil {
			t.Error(err)
		}
		if o.working.Load() != 0 {
			t.Error("the end did not wait for a fetch")
		}
		if err := <-got; !errors.Is(err, registry.ErrUnavailable) {
			t.Error(err)
		}
		if _, err := c.get(t.Context(), question{"r", theBlob}, sourceKey{}); !errors.Is(err, registry.ErrUnavailable) {
			t.Errorf("after the end: %v", err)
		}
	})
}
