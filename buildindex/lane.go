package buildindex

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/layout"
)

const (
	outboxBatch = 1000
	outboxPoll  = 500 * time.Millisecond
	outboxMax   = 10 * time.Second // between tries while the bucket is down
	outboxIdle  = time.Minute      // without anything to do
	// rowsAtOnce is how many changes are written to one bucket at the same time; each has few requests under way.
	rowsAtOnce = 128
	rowStall   = time.Minute     // for one row without any progress
	askEvery   = 2 * time.Second // how often a bucket that nothing is written to is asked how it is, at most
)

// lane writes the changes for one bucket, and only these: what stops one bucket stops no other. The lane without a name
// has the rows of repositories for which no bucket is configured.
type lane struct {
	x    *Index
	name string
	kick chan struct{}
	soon chan struct{} // has one when a client waits for a change

	mu    sync.Mutex
	mark  int64            // the last generation that the bucket knows to be committed
	err   error            // of the last round
	state bucket.Condition // of the bucket, as it has answered last
	since time.Time        // it is in it
	told  bucket.Condition // what the log has of it
	asked time.Time        // when it has answered last, or did not
	down  error            // why it did not
}

// newLanes returns one for each bucket, and one for repositories without.
func (x *Index) newLanes() (out []*lane) {
	for _, c := range x.cfg.Buckets {
		out = append(out, x.newLane(c.Name))
	}
	return append(out, x.newLane(""))
}

func (x *Index) newLane(name string) *lane {
	return &lane{x: x, name: name, kick: make(chan struct{}, 1), soon: make(chan struct{}, 1)}
}

// bucketOf returns the name of a repository's bucket, empty when none is configured.
func (x *Index) bucketOf(repo string) string {
	name, _, _ := x.buckets.For(repo)
	return name
}

// outbox writes changes to the buckets until ctx is done.
func (x *Index) outbox(ctx context.Context) error {
	select {
	case <-x.tenure.begun:
	case <-ctx.Done():
		return nil
	}
	if err := x.assign(ctx); err != nil {
		return err
	}
	var g errgroup.Group
	for _, l := range x.lanes {
		g.Go(func() error { l.run(ctx); return nil })
		g.Go(func() error { l.express(ctx); return nil })
	}
	return g.Wait()
}

// assign tells every queued change its bucket, where the configuration has changed since it was queued.
func (x *Index) assign(ctx context.Context) error {
	after := int64(0)
	for {
		rows, err := x.db.Outbox(ctx, names.AllBuckets, after, outboxBatch)
		if err != nil || len(rows) == 0 {
			return err
		}
		after = rows[len(rows)-1].ID
		err = x.db.Update(ctx, func(tx names.Tx) error {
			for _, row := range rows {
				if want := x.bucketOf(row.Record.Repository); row.Err == nil && row.Bucket != want {
					if err := tx.SetBucket(row.ID, want); err != nil {
						return err
					}
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("outbox: %w", err)
		}
	}
}

// wake makes all lanes look for changes.
func (x *Index) wake() {
	for _, l := range x.lanes {
		notify(l.kick)
		notify(l.soon)
	}
}

// notify puts one into a channel of one, if it is empty.
func notify(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// drain works once through the outbox of every bucket. left says that rows have to wait.
func (x *Index) drain(ctx context.Context) (left bool, err error) {
	lefts, errs := make([]bool, len(x.lanes)), make([]error, len(x.lanes))
	var wg sync.WaitGroup
	for i, l := range x.lanes {
		wg.Go(func() { lefts[i], errs[i] = l.round(ctx) })
	}
	wg.Wait()
	for _, l := range lefts {
		left = left || l
	}
	return left, errors.Join(errs...)
}

func (l *lane) run(ctx context.Context) {
	l.report(ctx, l.ask(ctx))
	wait := outboxPoll
	for {
		left, err := l.turn(ctx)
		if ctx.Err() != nil {
			return
		}
		pause := wait
		switch {
		case err != nil:
			l.x.m.outboxErrors.Inc()
			wait = min(2*wait, outboxMax)
		case left:
			wait = outboxPoll
		default:
			pause, wait = outboxIdle, outboxPoll
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-l.kick:
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// turn makes a round, and asks the bucket how it is where the round did not come to that: there was nothing to write,
// or nothing that could be. It reports and returns what both say.
func (l *lane) turn(ctx context.Context) (left bool, err error) {
	began := time.Now()
	left, err = l.round(ctx)
	if down := l.askedSince(ctx, began); down != nil && !errors.Is(err, down) {
		err = errors.Join(down, err)
	}
	l.report(ctx, err)
	return left, err
}

// report notes how the last round went, and logs when that changes.
func (l *lane) report(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	l.mu.Lock()
	was, told := l.err, l.told
	l.err, l.told = err, l.state
	l.mu.Unlock()
	switch {
	case err != nil && (was == nil || told != l.told):
		l.x.log.Warn("names will be written to the bucket later; pushes go on", "bucket", l.name, "error", err)
	case err == nil && was != nil:
		l.x.log.Info("the bucket takes names again", "bucket", l.name)
	}
}

// ask asks the bucket anything and notes how it answers. It returns errNoBucket for one that does not exist.
func (l *lane) ask(ctx context.Context) error {
	b, ok := l.x.buckets.Get(l.name)
	if !ok {
		return nil
	}
	err := probe(ctx, l.name, b)
	if ctx.Err() == nil {
		l.answered(err)
	}
	return err
}

// askedSince returns why the bucket can't be used. It asks it if it was not used since began, or, where there was
// nothing against it, askEvery before.
func (l *lane) askedSince(ctx context.Context, began time.Time) error {
	l.mu.Lock()
	asked, down := l.asked, l.down
	l.mu.Unlock()
	if down == nil {
		began = began.Add(-askEvery)
	}
	if asked.Before(began) {
		return l.ask(ctx)
	}
	return down
}

// answered notes how the bucket has answered, which alone says what state it is in.
func (l *lane) answered(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	state := bucket.ConditionOf(err)
	if errors.Is(err, errNoBucket) {
		state = bucket.Missing
	}
	if state != l.state {
		l.state, l.since = state, time.Now()
	}
	l.asked, l.down = time.Now(), err
}

// bucketIsAway reports whether the bucket of a repository did not answer when it was used or asked last.
func (x *Index) bucketIsAway(repo string) bool {
	name := x.bucketOf(repo)
	i := slices.IndexFunc(x.lanes, func(l *lane) bool { return l.name == name })
	if i < 0 {
		return false
	}
	l := x.lanes[i]
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state != "" && l.state != bucket.Ready && l.state != bucket.Unknown
}

// status is what GET /writeback says of the bucket.
func (l *lane) status() cluster.BucketState {
	l.mu.Lock()
	defer l.mu.Unlock()
	state := l.state
	if state == "" {
		state = bucket.Unknown
	}
	return cluster.NewBucketState(l.name, string(state), l.since, l.err)
}

// check is what readiness says of the bucket.
func (l *lane) check(context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

var errNoBucket = errors.New("there is no such bucket: create it, or correct its url")

// probe asks a bucket anything. It returns errNoBucket for one that does not exist.
func probe(ctx context.Context, name string, b bucket.Bucket) error {
	limit, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	answered := errors.New("answered")
	err := b.List(limit, layout.RepositoriesRoot, "", func(bucket.Object) error { return answered })
	switch {
	case err == nil, errors.Is(err, answered):
		return nil
	case errors.Is(err, bucket.ErrNotFound), errors.Is(err, bucket.ErrMissing):
		return fmt.Errorf("bucket %s: %w", name, errNoBucket)
	}
	return err
}

// round works once through the rows of the lane. left says that rows have to wait; an error, that the bucket, or
// origins, could not be asked. A row that fails for a reason of its own is set aside for a while, and the others go on.
func (l *lane) round(ctx context.Context) (left bool, err error) {
	if l.x.stale.Load() {
		return true, nil // what is queued may be older than what the bucket has
	}
	after := int64(0)
	var unreachable error
	for {
		rows, err := l.x.db.Outbox(ctx, l.name, after, outboxBatch)
		if err != nil {
			return true, err
		}
		if len(rows) == 0 {
			return left, unreachable
		}
		after = rows[len(rows)-1].ID
		b := &batch{lane: l, rows: rows}
		if err := b.run(ctx); err != nil {
			return true, err
		}
		left = left || b.left > 0
		if b.unreachable != nil {
			unreachable = b.unreachable
		}
	}
}
