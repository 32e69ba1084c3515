package origin

import (
	"fmt"
	"net/http"
	"sync"
	"time"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// holder is the lease of one build-index. It is memory: after a restart whoever asks first has it, also one that has
// lost it elsewhere. So it counts at most of the origins only, and who has it at fewer ends when another has it at one.
type holder struct {
	mu    sync.Mutex
	id    string
	until time.Time
}

// paidFor is for how long a blob that was written back is still told to a build-index, at least: until one that has
// asked for it since its start renews its lease after that. A membership is committed a moment after its blob, and its
// generation is known here after the next renewal.
const paidFor = 30 * time.Second

// ask gives the lease to who asks, if nobody else has it, and says whose it is, for how long if it is another's, and
// who had it before.
func (h *holder) ask(id string, length time.Duration, now time.Time) (out cluster.HolderResponse) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.id != id && now.Before(h.until) {
		return cluster.HolderResponse{Holder: h.id, Left: h.until.Sub(now)}
	}
	out = cluster.HolderResponse{Holder: id, Before: h.id}
	h.id, h.until = id, now.Add(length)
	return out
}

// admits returns registry.ErrHeld when the lease is another's than that of who asks; an empty id is not compared.
func (h *holder) admits(id string, now time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if id != "" && h.id != id && now.Before(h.until) {
		return fmt.Errorf("%w: it is %.300s", registry.ErrHeld, h.id)
	}
	return nil
}

// holderRoute lets one build-index at a time write names, and remembers the last generation that one has committed.
func (o *Origin) holderRoute(w http.ResponseWriter, r *http.Request, _ registry.ExtensionPath) error {
	var q cluster.HolderRequest
	if err := decode(r, 4<<10, &q); err != nil {
		return err
	}
	latest := time.Now().Add(cluster.MaxGenerationSkew).UnixMicro()
	if q.Holder == "" || len(q.Holder) > 300 || q.For < 0 || q.For > cluster.MaxHolderLease || q.Generation < 0 || q.Generation > latest {
		return fmt.Errorf("%w: want a holder, at most %s and a generation of at most %d", errBody, cluster.MaxHolderLease, latest)
	}
	out := o.holder.ask(q.Holder, q.For, time.Now())
	raise := q.Generation
	if out.Holder != q.Holder {
		raise = 0 // it is not to be believed
	}
	var err error
	if out.Generation, err = o.store.RaiseGeneration(raise); err != nil {
		return err
	}
	if raise > 0 && !q.KeepPaid {
		// What was committed before that payment is counted in the generation that was just stored.
		if err := o.store.ForgetPaid(time.Now().Add(-paidFor)); err != nil {
			return err
		}
	}
	transport.ServeJSON(w, http.StatusOK, out)
	return nil
}
