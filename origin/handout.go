package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// counting tells the leases which ranges are read, and keeps their reading to the upload rates.
type counting struct{ *Origin }

// OpenBlob implements registry.Blobs.
func (c counting) OpenBlob(ctx context.Context, repo string, d digest.Digest, hint registry.Range) (*registry.Content, error) {
	content, err := c.Origin.OpenBlob(ctx, repo, d, hint)
	if err == nil {
		if n := c.leasesOf(ctx, repo, d).sending(d, hint, content.Size); n > 0 {
			who, _ := ctx.Value(askerKey{}).(asker)
			pl := blob.PieceLength(content.Size)
			read := c.budgets.reading(who, d, int(hint.Offset/pl), int((hint.Offset+n-1)/pl))
			done, closed := c.turns.beginSend(n), content.Close
			content.Close = func() error {
				limit, stop := context.WithTimeout(ctx, leaseFor)
				transport.AwaitSent(limit, turnLimit)
				stop()
				done()
				at, err := content.Reader().Seek(0, io.SeekCurrent)
				read(err == nil && at >= hint.Offset+n)
				return closed()
			}
		}
		// without a limit a file stays one, for sendfile
		if r := c.swarm.LimitUpload(ctx, d, content.Reader()); content.File == nil || r != io.ReadSeeker(content.File) {
			content.File, content.Body = nil, r
		}
	}
	return content, err
}

func (o *Origin) leaseRoute(w http.ResponseWriter, r *http.Request, repo string, d digest.Digest) error {
	var q cluster.LeaseRequest
	if err := decode(r, blob.MaxMetainfo/16, &q); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), time.Second)
	defer cancel()
	m, f, err := o.leasable(ctx, repo, d)
	if err != nil {
		return err
	}
	have, err := blob.ParseBitmap(m.NumPieces(), q.Have)
	if err != nil {
		return fmt.Errorf("%w: have: %w", errBody, err)
	}
	if len(q.Peer) > maxPeer {
		return fmt.Errorf("%w: peer %.50q: want 40 hex digits", errBody, q.Peer)
	}
	if q.Max < 1 || q.Max > cluster.MaxLeasePieces || len(q.Want) > 10*cluster.MaxLeasePieces {
		return fmt.Errorf("%w: max is %d, want names %d pieces", errBody, q.Max, len(q.Want))
	}
	who := asker{sourceOf(r), q.Peer}
	var out cluster.LeaseResponse
	if f == nil {
		out, err = o.lease(r.Context(), o.leases, m, have, who, q)
	} else {
		out, err = f.lease(r.Context(), have, who, q)
	}
	if err != nil {
		return err
	}
	o.m.leased.Add(float64(len(out.Pieces)))
	return transport.WriteJSON(w, http.StatusOK, out)
}

// lease hands out pieces that from counts, when the turn of who asks has come, as far as its budget allows.
func (o *Origin) lease(ctx context.Context, from *leases, m *blob.Metainfo, have blob.Bitmap, who asker, q cluster.LeaseRequest) (cluster.LeaseResponse, error) {
	most, doubtful, refused, leave := o.budgets.enter(who, q.Max)
	if most == 0 { // the answer waits here, so that who asks again at once costs little
		select {
		case <-time.After(budgetWait):
		case <-ctx.Done():
		}
		return cluster.LeaseResponse{RetryAfter: turnRetryAfter, HeldBack: refused}, nil
	}
	defer leave()
	if !from.enter(m) {
		return cluster.LeaseResponse{}, &registry.RetryError{Err: fmt.Errorf("%w: %s is leased to many agents now", registry.ErrTooManyRequests, m.Digest), After: time.Second}
	}
	defer from.leave(m.Digest)
	take := o.turns.take
	if doubtful {
		take = o.turns.takeLast
	}
	if q.Max = take(ctx, who.share(), m.PieceLength(), most); q.Max == 0 {
		return cluster.LeaseResponse{RetryAfter: turnRetryAfter}, nil
	}
	replica, replicas := o.replica(m.Digest, q.Only)
	hand := from.hand
	if doubtful {
		hand = from.handAside
	}
	out := hand(m, have, q, replica, replicas)
	o.turns.unused(who.share(), int64(q.Max-len(out.Pieces))*m.PieceLength())
	o.budgets.lend(who, m.Digest, out.Pieces)
	return out, nil
}

// leasable returns the metainfo of a blob that is here, or else the provisional one of a fetch that brings it.
func (o *Origin) leasable(ctx context.Context, repo string, d digest.Digest) (*blob.Metainfo, *fetch, error) {
	m, err := o.metainfo(ctx, d)
	if errors.Is(err, registry.ErrBlobUnknown) {
		if f := o.inFlight(ctx, repo, d); f != nil {
			return f.m, f, nil
		}
		m, err = o.metainfo(ctx, d) // it may have come whole meanwhile
	}
	return m, nil, err
}

// replica returns which of how many replicas this origin leads as: of one where the agent leases from no other.
func (o *Origin) replica(d digest.Digest, only bool) (replica, replicas int) {
	if only {
		return 0, 1
	}
	ring := o.origins.Ring()
	return max(0, slices.Index(ring.Owners(d), o.cfg.ID)), ring.Replicas()
}

// budgetWait is how long who has leased as much as it may waits for being told so.
const budgetWait = 100 * time.Millisecond
