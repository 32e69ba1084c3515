package buildindex

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/buildindex/names"
	"kraken/buildindex/names/sqlite"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/layout"
)

// stuck has no answer to some writes, until they are given up.
type stuck struct {
	bucket.Bucket
	hangs func(key string) bool
}

func (s stuck) Put(ctx context.Context, key string, r io.Reader) error {
	if s.hangs(key) {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	return s.Bucket.Put(ctx, key, r)
}

// lonely is an index without origins and listeners, whose bucket is in memory, in virtual time.
func lonely(t *testing.T, wrap func(bucket.Bucket) bucket.Bucket) *Index {
	x := &Index{
		log: slog.New(slog.DiscardHandler), cfg: Config{Buckets: []bucket.Config{{Name: "b", URL: "mem://"}}, Repositories: []Policy{{re: regexp.MustCompile(".*"), References: "lax"}}},
		buckets: memory(t).Wrap(func(_ string, b bucket.Bucket) bucket.Bucket { return wrap(b) }), tenure: tenure{begun: make(chan struct{})},
	}
	close(x.tenure.begun)
	x.aside.rows = map[int64]*asideRow{}
	db, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "x.db"))
	if err != nil {
		t.Fatal(err)
	}
	x.db, x.lanes, x.m = db, x.newLanes(), newMetrics(prometheus.NewRegistry(), x)
	return x
}

// A write that hangs in the bucket, of a stamp, a manifest or a mark, holds up no other that a client waits for, and is
// begun anew while its client waits.
func TestHangingWriteHoldsUpNobody(t *testing.T) {
	for what, hangs := range map[string]func(key string) bool{
		"its stamp":    func(key string) bool { return strings.Contains(key, "/tags/hangs/") },
		"its manifest": func(key string) bool { return strings.Contains(key, digest.FromBytes(raw("", "a/hangs")).Encoded()) },
		"its mark":     nil,
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var healed atomic.Bool
				var mark atomic.Pointer[string] // of the first change
				x := lonely(t, func(b bucket.Bucket) bucket.Bucket {
					return stuck{b, func(key string) bool {
						return !healed.Load() && (hangs != nil && hangs(key) || hangs == nil && key == *mark.Load())
					}}
				})
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan struct{})
				go func() {
					defer close(done)
					x.lanes[0].express(ctx)
				}()
				defer func() {
					cancel()
					<-done
					if err := x.db.Close(); err != nil {
						t.Error(err)
					}
				}()
				push := func(tag string) <-chan struct{} {
					b := raw("", "a/"+tag)
					rec, err := x.record(cluster.PutTag("repo", tag, digest.FromBytes(b)))
					if err != nil {
						t.Fatal(err)
					}
					key := layout.GenerationKey(rec.Generation)
					mark.CompareAndSwap(nil, &key)
					p, err := parseManifest("", b)
					if err != nil {
						t.Fatal(err)
					}
					rec.MediaType, rec.Size, rec.Bytes = p.mediaType, int64(len(b)), b
					wait := x.publications.expect([]cluster.NameRecord{rec})[0]
					if err := x.db.Update(ctx, func(tx names.Tx) error { return errors.Join(x.apply(tx, rec, p), x.enqueue(tx, rec)) }); err != nil {
						t.Fatal(err)
					}
					x.wake()
					return wait
				}
				is := func(c <-chan struct{}) bool {
					synctest.Wait()
					select {
					case <-c:
						return true
					default:
						return false
					}
				}
				first := push("hangs")
				time.Sleep(time.Second)
				if is(first) {
					t.Fatal("what hangs is in the bucket")
				}
				for _, tag := range []string{"one", "two", "three"} {
					c := push(tag)
					if time.Sleep(time.Second); !is(c) {
						t.Errorf("%s is not in the bucket after a second", tag)
					}
				}
				healed.Store(true)
				if time.Sleep(expressStall + time.Second); !is(first) {
					t.Error("what hung is not in the bucket, although it could be")
				}
			})
		})
	}
}

// creeping takes a byte a second.
type creeping struct{ bucket.Bucket }

func (s creeping) Put(_ context.Context, _ string, r io.Reader) error {
	for b := make([]byte, 1); ; {
		time.Sleep(time.Second)
		if _, err := r.Read(b); err == io.EOF {
			return nil
		}
	}
}

// A write that gets on, however slowly, is not given up; one that stops is.
func TestWriteThatGetsOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, b, stop := whileMoving(t.Context(), creeping{}, 2*time.Second)
		defer stop()
		if err := b.Put(ctx, "x", strings.NewReader(strings.Repeat("x", 60))); err != nil || ctx.Err() != nil {
			t.Errorf("%v, %v after a write that gets on", err, context.Cause(ctx))
		}
		time.Sleep(2*time.Second + 1)
		if err := context.Cause(ctx); !errors.Is(err, errStalled) {
			t.Errorf("%v after a write that stopped", err)
		}
	})
}
