package buildindex

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"kraken/proto/cluster"
)

// hang has requests about what wait until they are given up. With trickle they are answered without end.
func (f *fakeOrigin) hang(what string, trickle bool) {
	f.set(func() {
		f.first = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/"+what) {
				return false
			}
			_, _ = io.Copy(io.Discard, r.Body) // else nobody notices that the caller has given up
			if !trickle {
				<-r.Context().Done()
				return true
			}
			for t := time.NewTicker(10 * time.Millisecond); r.Context().Err() == nil; <-t.C {
				_, _ = io.WriteString(w, "{}\n")
				_ = http.NewResponseController(w).Flush()
			}
			return true
		}
	})
}

// A start waits for no origin that hangs, whatever it was asked, where the others are enough; what it keeps is taken
// over when it answers.
func TestStartBesideAHungOrigin(t *testing.T) {
	for _, what := range []string{"holder", "names", "pending", "names, in trickles", "pending, in trickles"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.origins = append(r.origins, newFakeOrigin(t))
			r.start("first.db")
			r.must(r.x.fill(t.Context()))
			d := r.put("v", "one")
			hung := r.origins[2]
			for _, o := range r.origins[:2] {
				o.set(func() { clear(o.names) })
			}
			late := forged("w", raw("", "a/late"), time.Now().UnixMicro())
			hung.set(func() { hung.names[cluster.NameKey(late)] = r.x.signer.Sign(late) })
			asked, trickle := strings.CutSuffix(what, ", in trickles")
			hung.hang(asked, trickle)
			began := time.Now()
			r.start("first.db")
			r.must(r.x.takeOver(t.Context()))
			r.must(r.x.fill(t.Context()))
			if took := time.Since(began); took > 8*time.Second || !r.x.heard() {
				t.Errorf("heard: %t, after %s", r.x.heard(), took)
			}
			r.reads("beside the hung origin", "v", d)
			hung.set(func() { hung.first = nil })
			if what != "holder" { // else it was heard
				r.wantTag("w", "")
			}
			r.must(r.x.reconcile(t.Context(), r.x.origins.All()))
			r.wantTag("w", late.Digest)
		})
	}
}
