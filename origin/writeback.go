package origin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/bucket"
	"kraken/origin/store"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
	"kraken/proto/transport"
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
		marked := o.store.Marked()
		o.tries.keep(marked)
		for _, d := range marked {
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
	return o.tries.due(d)
}

// workOff does what one marked blob needs and notes when to look again.
func (o *Origin) workOff(ctx context.Context, d digest.Digest) {
	m, err := o.store.Marker(d)
	if errors.Is(err, store.ErrNotFound) {
		o.tries.forget(d) // meanwhile
		return
	}
	wait, alone := time.Duration(0), true
	if err == nil {
		wait, alone, err = o.workOnce(ctx, d, m)
	}
	if ctx.Err() != nil {
		return
	}
	if err == nil && wait == 0 {
		o.tries.forget(d)
		return
	}
	later := isLater(err) && !errors.Is(err, errBucketDown)
	told := err
	if later {
		told = nil
	}
	in := o.tries.note(d, wait, alone, told)
	switch {
	case err == nil || errors.Is(err, errBucketDown):
	case later: // an origin that is well verifies a large copy before it owes it
		o.log.Info("write-back goes on later", "digest", d, "in", in, "reason", err)
	default:
		o.m.writebackErrors.Inc()
		o.log.Warn("write-back will be tried again", "digest", d, "in", in, "error", err)
	}
}

// isLater reports whether an error is only that somebody asked to come back.
func isLater(err error) bool {
	var later *registry.RetryError
	return errors.As(err, &later)
}

// workOnce makes one try. It returns 0 when nothing is owed any more, else after how long at most to try again; alone
// says that not all owners are known to owe the blob.
func (o *Origin) workOnce(ctx context.Context, d digest.Digest, m store.Marker) (wait time.Duration, alone bool, err error) {
	if size, lost := o.store.Lost(d); lost {
		if settled, err := o.recover(ctx, d, m, size); settled || err != nil {
			return 0, true, err
		}
	}
	i, err := o.store.Stat(d)
	if err != nil {
		return 0, true, err
	}
	// The bucket first: who has paid must not be made to owe again.
	left, berr := o.payWhatIsThere(ctx, d, m, i.Size)
	owns := o.origins.Ring().Owns(o.cfg.ID, d)
	switch {
	case len(left) == 0 && owns:
		return 0, false, nil
	case len(left) == 0:
		return 0, false, o.leave(ctx, d)
	case !owns:
		err = o.moveToOwners(ctx, d, m)
		if err == nil || isLater(err) {
			return 0, err != nil, err
		}
	default:
		err = o.spread(ctx, d, m, false)
	}
	if err != nil {
		// The bucket must not wait for an owner that is down.
		alone = true
		o.log.Info("not all owners owe a blob yet", "digest", d, "error", err)
	}
	if berr != nil {
		return 0, alone, berr
	}
	if !o.leads(ctx, d) && time.Since(m.Created) <= time.Duration(o.cfg.Takeover) {
		return 2 * time.Second, alone, nil
	}
	for _, target := range left {
		b, _ := o.buckets.Get(target)
		err := o.upload(ctx, d, b)
		if err == nil {
			err = o.paid(ctx, d, m, target, b)
		}
		if err != nil {
			return 0, alone, o.blame(ctx, target, err)
		}
		o.m.writtenBack.Inc()
	}
	if !owns {
		return 0, false, o.leave(ctx, d)
	}
	return 0, false, nil
}

// payWhatIsThere takes off the debt what a bucket has. left are the targets that don't have the blob, or that could not
// be asked; of these err tells why.
func (o *Origin) payWhatIsThere(ctx context.Context, d digest.Digest, m store.Marker, size int64) (left []string, err error) {
	var errs []error
	for _, target := range slices.Clone(m.Targets) {
		done, err := o.payIfThere(ctx, d, m, target, size)
		if err != nil {
			errs = append(errs, err)
		}
		if !done {
			left = append(left, target)
		}
	}
	return left, errors.Join(errs...)
}

// payIfThere takes one bucket off the debt if it has the blob, verified. size may be store.SizeUnknown.
func (o *Origin) payIfThere(ctx context.Context, d digest.Digest, m store.Marker, target string, size int64) (bool, error) {
	b, ok := o.buckets.Get(target)
	if !ok {
		return false, fmt.Errorf("marker of %s names bucket %q, which is not configured", d, target)
	}
	if !o.monitor.Up(target) { // it may hang, and what the owners owe each other must not wait for it
		return false, fmt.Errorf("bucket %s: %w", target, errBucketDown)
	}
	there, err := hasVerified(ctx, b, d, size)
	if err == nil && there {
		err = o.paid(ctx, d, m, target, b)
	}
	return there && err == nil, o.blame(ctx, target, err)
}

// errBucketDown is the failure of a bucket that is down: no blob is to blame, and the log has had its line.
var errBucketDown = errors.New("the bucket can't be used now")

// blame returns err, as errBucketDown where the bucket is.
func (o *Origin) blame(ctx context.Context, target string, err error) error {
	if o.monitor.Failed(ctx, target, err) {
		return fmt.Errorf("bucket %s: %w: %w", target, errBucketDown, err)
	}
	return err
}

// bucketIsBack makes all that is owed be tried now.
func (o *Origin) bucketIsBack() {
	o.tries.allDue()
	o.wake()
}

// hasVerified reports whether a bucket has the blob: by the digest that the bucket keeps with the object, which was
// hashed on its way there, or by reading it. size may be store.SizeUnknown.
func hasVerified(ctx context.Context, b bucket.Bucket, d digest.Digest, size int64) (bool, error) {
	obj, err := b.Stat(ctx, layout.BlobKey(d))
	switch {
	case errors.Is(err, bucket.ErrNotFound):
		return false, nil
	case err != nil:
		return false, err
	case size != store.SizeUnknown && obj.Size != size:
		return false, nil
	case obj.Digest == d:
		return true, nil
	}
	r, err := b.Open(ctx, layout.BlobKey(d), 0, -1)
	if err != nil {
		return false, err
	}
	defer r.Close()
	v := d.Verifier()
	if _, err := io.Copy(v, r); err != nil {
		return false, err
	}
	return v.Verified(), nil
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

// leads reports whether this origin is the first of the owners that owe the blob and answer.
func (o *Origin) leads(ctx context.Context, d digest.Digest) bool {
	for _, or := range o.origins.Owners(d) {
		if or.ID == o.cfg.ID {
			return true
		}
		if !or.Answers() {
			continue
		}
		ctx := transport.WithProgressTimeout(ctx, otherPatience)
		_, err := or.Owes(ctx, cluster.AnyRepository, d)
		if errors.Is(err, registry.ErrUnsupported) { // of an older version
			_, err = or.LocalStat(ctx, cluster.AnyRepository, d)
		}
		if o.heard(or, err) == nil {
			return false
		}
	}
	return true
}

// upload writes bytes, then metainfo. The bytes are hashed on their way: what has rotted here does not get into the
// bucket, and is dropped.
func (o *Origin) upload(ctx context.Context, d digest.Digest, b bucket.Bucket) error {
	c, err := o.local(d)
	if err != nil {
		return err
	}
	defer c.Close()
	body, err := bucket.NewChecked(d, c.Reader())
	if err != nil {
		return err
	}
	if err := b.Put(ctx, layout.BlobKey(d), body); errors.Is(err, bucket.ErrContent) {
		return errors.Join(fmt.Errorf("write back %s: %w", d, err), o.dropRotten(ctx, d))
	} else if err != nil {
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
	alone, err := o.tries.state()
	s := cluster.WritebackStatus{Pending: n, Names: o.store.NumNames(), Scanning: o.store.Scanning(), Lost: o.store.NumLost(), Alone: alone}
	if s.Scanning {
		s.Pending++ // there may be more: nobody must take 0 for an answer yet
	}
	if !oldest.IsZero() {
		s.Oldest = oldest.Format(time.RFC3339)
	}
	if err != nil {
		s.Error = err.Error()
	}
	for _, b := range o.monitor.States() {
		if errors.Is(err, errBucketDown) && b.Err != nil {
			s.Error = fmt.Sprintf("bucket %s: %v: %v", b.Name, errBucketDown, b.Err)
		}
		s.Buckets = append(s.Buckets, cluster.NewBucketState(b.Name, string(b.Condition), b.Since, b.Err))
	}
	return s
}

func (o *Origin) pending(w http.ResponseWriter, _ *http.Request, _ registry.ExtensionPath) error {
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
	// After the markers: one that is paid meanwhile is in both lists, or in this one.
	for d, p := range o.store.Paid() {
		if err := enc.Encode(cluster.PendingBlob{Digest: d, Size: p.Size, Repositories: p.Repositories, Paid: p.At}); err != nil {
			return ignoreWrite(err)
		}
	}
	return nil
}
