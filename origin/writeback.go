package origin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/bucket"
	"kraken/origin/store"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

const (
	writebackIdle = time.Second
	maxBackoff    = 30 * time.Second
)

func (o *Origin) wake() {
	select {
	case o.kick <- struct{}{}:
	default:
	}
}

// writeback works off the markers, which are the queue: the ones found at the start and the ones that come. For each
// blob it sees to it that the owners have it and that the bucket gets it from one of them.
func (o *Origin) writeback(ctx context.Context) error {
	slots := make(chan struct{}, o.cfg.WritebackWorkers)
	t := time.NewTicker(writebackIdle)
	defer t.Stop()
	for {
		for _, d := range o.store.Marked() {
			if !o.due(d) {
				continue
			}
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return nil
			}
			if _, again := o.busy.LoadOrStore(d, true); again {
				<-slots
				continue
			}
			o.Background(func(ctx context.Context) {
				defer func() {
					o.busy.Delete(d)
					<-slots
				}()
				o.workOff(ctx, d)
			})
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		case <-o.kick:
		}
	}
}

func (o *Origin) due(d digest.Digest) bool {
	if _, busy := o.busy.Load(d); busy {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return time.Now().After(o.retry[d].at)
}

// workOff does what one marked blob needs and notes when to look again.
func (o *Origin) workOff(ctx context.Context, d digest.Digest) {
	m, err := o.store.Marker(d)
	if err != nil {
		return // paid meanwhile
	}
	wait, err := o.workOnce(ctx, d, m)
	if ctx.Err() != nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if err == nil && wait == 0 {
		delete(o.retry, d)
		o.lastErr = nil
		return
	}
	r := o.retry[d]
	r.delay = min(max(2*r.delay, time.Second), maxBackoff)
	if err == nil {
		r.delay = min(r.delay, wait)
	} else {
		o.lastErr = err
		o.m.writebackErrors.Inc()
		o.log.Warn("write-back will be tried again", "digest", d, "in", r.delay, "error", err)
	}
	r.at = time.Now().Add(r.delay)
	o.retry[d] = r
}

// workOnce makes one try. It returns 0 when nothing is owed any more, else after how long at most to try again.
func (o *Origin) workOnce(ctx context.Context, d digest.Digest, m store.Marker) (wait time.Duration, err error) {
	if size, lost := o.store.Lost(d); lost {
		if settled, err := o.recover(ctx, d, m, size); settled || err != nil {
			return 0, err
		}
	}
	if !o.origins.Ring().Owns(o.cfg.ID, d) {
		return o.moveToOwners(ctx, d, m)
	}
	if err := o.spread(ctx, d, m); err != nil {
		// The other owner is down. The bucket must not wait for it.
		o.log.Info("the other owner has no copy yet", "digest", d, "error", err)
	}
	for _, target := range m.Targets {
		b, ok := o.buckets.Get(target)
		if !ok {
			return 0, fmt.Errorf("marker of %s names bucket %q, which is not configured", d, target)
		}
		done, err := o.intoBucket(ctx, d, m, target, b)
		if err != nil {
			return 0, err
		}
		if !done {
			return 2 * time.Second, nil
		}
	}
	return 0, nil
}

// intoBucket writes the blob, or waits for the first owner to do so.
func (o *Origin) intoBucket(ctx context.Context, d digest.Digest, m store.Marker, target string, b bucket.Bucket) (done bool, err error) {
	i, err := o.store.Stat(d)
	if err != nil {
		return false, err
	}
	obj, err := b.Stat(ctx, layout.BlobKey(d))
	switch {
	case err == nil && obj.Size == i.Size:
	case err != nil && !errors.Is(err, bucket.ErrNotFound):
		return false, err
	case o.leads(ctx, d) || time.Since(m.Created) > time.Duration(o.cfg.Takeover):
		if err := o.upload(ctx, d, b); err != nil {
			return false, err
		}
	default:
		return false, nil
	}
	if err := o.paid(ctx, d, m, target, b); err != nil {
		return false, err
	}
	o.m.writtenBack.Inc()
	return true, nil
}

// paid links a blob that a bucket has to the repositories that it was pushed to, and takes the bucket off what is owed.
func (o *Origin) paid(ctx context.Context, d digest.Digest, m store.Marker, target string, b bucket.Bucket) error {
	for _, repo := range m.Repositories {
		if err := b.Put(ctx, layout.LayerLink(repo, d), bytes.NewReader(layout.Link(d))); err != nil {
			return err
		}
	}
	o.durable.Add(target+" "+d.String(), true)
	return o.store.Unmark(d, m, target)
}

// leads says that this origin is the first owner that is alive.
func (o *Origin) leads(ctx context.Context, d digest.Digest) bool {
	for _, or := range o.origins.Owners(d) {
		if or.ID == o.cfg.ID {
			return true
		}
		pctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := or.LocalStat(pctx, cluster.AnyRepository, d)
		cancel()
		if err == nil {
			return false
		}
	}
	return true
}

// upload writes bytes, then metainfo.
func (o *Origin) upload(ctx context.Context, d digest.Digest, b bucket.Bucket) error {
	c, err := o.local(d)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := b.Put(ctx, layout.BlobKey(d), c.Reader()); err != nil {
		return err
	}
	mi, err := o.metainfo(ctx, d)
	if err != nil {
		return fmt.Errorf("metainfo of %s: %w", d, err)
	}
	return b.Put(ctx, layout.MetainfoKey(d), bytes.NewReader(mi.Marshal()))
}

// status is what is left to write back. It is answered from memory.
func (o *Origin) status() cluster.WritebackStatus {
	n, oldest := o.store.Debts()
	s := cluster.WritebackStatus{Pending: n, Names: o.store.NumNames(), Scanning: o.store.Scanning(), Lost: o.store.NumLost()}
	if s.Scanning {
		s.Pending++ // there may be more: nobody must take 0 for an answer yet
	}
	if !oldest.IsZero() {
		s.Oldest = oldest.Format(time.RFC3339)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.lastErr != nil {
		s.Error = o.lastErr.Error()
	}
	return s
}

func (o *Origin) pending(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet {
		return fmt.Errorf("%w: %s pending", registry.ErrUnsupported, r.Method)
	}
	if o.store.Scanning() { // part of the list would be taken for all of it
		return &registry.RetryError{Err: fmt.Errorf("%w: the store is being scanned", registry.ErrUnavailable), After: time.Second}
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	enc := json.NewEncoder(w)
	for _, d := range o.store.Marked() {
		m, err := o.store.Marker(d)
		if err != nil {
			continue // paid meanwhile
		}
		i, err := o.store.Stat(d)
		if err != nil {
			continue
		}
		if err := enc.Encode(cluster.PendingBlob{Digest: d, Size: i.Size, Repositories: m.Repositories, Since: m.Created}); err != nil {
			return ignoreWrite(err)
		}
	}
	return nil
}
