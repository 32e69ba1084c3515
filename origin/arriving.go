package origin

import (
	"context"
	"crypto/sha1"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// arrivingWait is how long an answer waits for another piece.
const arrivingWait = time.Second

// arrivingRoute tells how far a blob is that is fetched from a bucket or an upstream, and begins that.
func (o *Origin) arrivingRoute(w http.ResponseWriter, r *http.Request, repo string, d digest.Digest) error {
	v := r.URL.Query()
	from := 0
	if s := v.Get("from"); s != "" {
		var err error
		if from, err = strconv.Atoi(s); err != nil || from < 0 {
			return fmt.Errorf("%w: from %.20q: want the number of a piece", errBody, s)
		}
	}
	a, err := o.arriving(r.Context(), repo, d, cluster.ArrivingRequest{From: from, Wait: isTrue(v.Get("wait")), Here: isTrue(v.Get("here"))})
	if err != nil {
		return err
	}
	return transport.WriteJSON(w, http.StatusOK, a)
}

// arriving says which pieces have come, from q.From on. Where that is none it waits for one, or for the end, when it is
// asked to.
func (f *fetch) arriving(ctx context.Context, q cluster.ArrivingRequest) (cluster.Arriving, error) {
	a := cluster.Arriving{Origin: f.o.cfg.ID, Size: f.size, From: q.From}
	if f.g == nil { // it was over when it was joined
		return f.ended(a)
	}
	limit := time.NewTimer(arrivingWait)
	defer limit.Stop()
	for {
		hashes, more := f.g.Pieces(q.From)
		a.Received = f.g.Received()
		if a.Hashes = hashes[:min(len(hashes), cluster.MaxArrivingHashes*sha1.Size)]; len(a.Hashes) > 0 || !q.Wait {
			return a, nil
		}
		select {
		case <-more:
		case <-limit.C:
			a.Received = f.g.Received()
			return a, nil
		case <-f.g.Ended():
			return f.ended(a)
		case <-ctx.Done():
			return a, context.Cause(ctx)
		}
	}
}

// ended completes what is said of a fetch that is over.
func (f *fetch) ended(a cluster.Arriving) (cluster.Arriving, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return a, &registry.RetryError{Err: fmt.Errorf("%w: blob %s: %w", registry.ErrUnavailable, f.d, f.err), After: refuseFor}
	}
	a.Whole = true
	return a, nil
}

// lease hands out pieces that have come, and waits up to arrivingWait for one that is due.
func (f *fetch) lease(ctx context.Context, have blob.Bitmap, who asker, q cluster.LeaseRequest) (cluster.LeaseResponse, error) {
	limit := time.NewTimer(arrivingWait)
	defer limit.Stop()
	for {
		here, offered := f.awaitPieces(ctx, have, q, limit.C)
		out, err := f.o.lease(ctx, f.leases, f.m, here, who, q)
		if err != nil || len(out.Pieces) > 0 || out.HeldBack {
			return out, err
		}
		if !offered || ctx.Err() != nil {
			out.RetryAfter = turnRetryAfter
			return out, nil
		}
	}
}

// awaitPieces waits until a piece has come that may be leased to who has some, and returns have with all pieces that
// have not come. It reports false when limit, or the fetch, ends the waiting.
func (f *fetch) awaitPieces(ctx context.Context, have blob.Bitmap, q cluster.LeaseRequest, limit <-chan time.Time) (blob.Bitmap, bool) {
	again := time.NewTicker(100 * time.Millisecond) // leases expire
	defer again.Stop()
	replica, replicas := f.o.replica(f.d, q.Only)
	for {
		hashes, more := f.g.Pieces(0)
		here := have.Clone()
		for i := len(hashes) / sha1.Size; i < here.Len(); i++ {
			here.Set(i)
		}
		select {
		case <-f.g.Ended():
			return here, false
		case <-limit:
			return here, false
		case <-ctx.Done():
			return here, false
		default:
		}
		if f.leases.offers(f.m, here, q, replica, replicas) {
			return here, true
		}
		select {
		case <-more:
		case <-again.C:
		case <-f.g.Ended():
		case <-limit:
			return here, false
		case <-ctx.Done():
		}
	}
}
