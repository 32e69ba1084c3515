package buildindex

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/layout"
)

// An origin that is back is heard at once, although a bucket is still being read, or the list of another origin.
func TestLateOriginIsHeardAtOnce(t *testing.T) {
	for _, busy := range []string{"bucket", "origin"} {
		t.Run("a "+busy+" is read", func(t *testing.T) {
			r := newRig(t)
			r.origins = append(r.origins, newFakeOrigin(t))
			release, begun := make(chan struct{}), make(chan struct{}, 1)
			r.wrap = func(b bucket.Bucket) bucket.Bucket {
				return &broken{Bucket: b, fail: func(call, key string) error {
					if busy == "bucket" && call == "list" && strings.HasPrefix(key, layout.RepositoriesRoot) {
						notify(begun)
						<-release
					}
					return nil
				}}
			}
			r.start("first.db")
			first, late := r.origins[0], r.origins[2]
			d := digest.FromString("only there")
			rec := cluster.NewRecord(cluster.PutName(cluster.MembershipName("repo", d)).At(time.Now().UnixMicro()), time.Now())
			rec.Size = 1
			late.set(func() {
				late.names[cluster.NameKey(rec)] = r.x.signer.Sign(rec)
				late.down = true
			})
			if busy == "origin" { // the look at all origins that follows the first hearing has no end
				var lists atomic.Int32
				first.set(func() {
					first.first = func(w http.ResponseWriter, q *http.Request) bool {
						if !strings.HasSuffix(q.URL.Path, "/names") && !strings.HasSuffix(q.URL.Path, "/names/") || lists.Add(1) == 1 {
							return false
						}
						notify(begun)
						trickle(w, q, release)
						return true
					}
				})
			}
			r.must(r.x.takeOver(t.Context()))
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- r.x.restore(ctx) }()
			ended := func() {
				close(release)
				cancel()
				r.must(<-done)
			}
			defer ended()
			<-begun
			late.set(func() { late.down = false })
			_, err := r.x.renew(t.Context(), holdFor) // as every two seconds
			r.must(err)
			r.await(func() bool {
				_, err := r.x.db.Layer(t.Context(), "repo", d)
				if err != nil && !errors.Is(err, names.ErrNotFound) {
					t.Fatal(err)
				}
				return err == nil
			})
		})
	}
}

// trickle answers without end until it is released, or nobody reads it.
func trickle(w http.ResponseWriter, q *http.Request, release <-chan struct{}) {
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-release:
			return
		case <-q.Context().Done():
			return
		case <-t.C:
			_, _ = io.WriteString(w, " ")
			_ = http.NewResponseController(w).Flush()
		}
	}
}

// await waits until something holds.
func (r *rig) await(holds func() bool) {
	r.Helper()
	t := time.NewTicker(time.Millisecond)
	defer t.Stop()
	for began := time.Now(); !holds(); <-t.C {
		if time.Since(began) > 20*time.Second {
			r.Fatal("it does not come to be")
		}
	}
}
