package buildindex

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"time"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/role"
)

// expressStall is how long a change that a client waits for may go without progress at the bucket until it is begun
// anew.
const expressStall = 5 * time.Second

// express writes the changes that clients wait for, again and again while they wait, beside the rounds: a backlog may
// take longer than they are patient. A row that a round writes at the same time is written twice, which changes
// nothing. Each change is written for itself: one that hangs holds up no other.
type express struct {
	*lane
	slots chan struct{} // has one for each change that is written
	wg    sync.WaitGroup
	mu    sync.Mutex
	busy  map[int64]bool // ids of rows that are written, or wait for a slot
}

// express runs the lane's express until ctx is done.
func (l *lane) express(ctx context.Context) {
	e := &express{lane: l, slots: make(chan struct{}, rowsAtOnce), busy: map[int64]bool{}}
	defer e.wg.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.soon:
		}
		for rows := l.awaited(ctx); len(rows) > 0; rows = l.awaited(ctx) {
			if rows = e.begin(rows); len(rows) > 0 {
				e.wg.Go(func() { e.write(ctx, rows) })
			}
			if !role.Pause(ctx, durableEvery) {
				return
			}
		}
	}
}

// awaited returns the rows of this bucket that clients wait for; none while the database is older than the bucket.
func (l *lane) awaited(ctx context.Context) (out []names.OutboxRow) {
	if l.x.stale.Load() {
		return nil
	}
	for _, generation := range l.x.publications.awaited() {
		rows, err := l.x.db.Queued(ctx, generation)
		if err != nil {
			return nil
		}
		for _, row := range rows {
			if row.Bucket == l.name && row.Err == nil && len(out) < outboxBatch {
				out = append(out, row)
			}
		}
	}
	return out
}

// begin returns those of the rows that nothing is done about yet, and are due. The caller writes them.
func (e *express) begin(rows []names.OutboxRow) []names.OutboxRow {
	e.mu.Lock()
	defer e.mu.Unlock()
	rows = slices.DeleteFunc(rows, func(r names.OutboxRow) bool { return e.busy[r.ID] || !e.x.aside.due(r.ID) })
	for _, r := range rows {
		e.busy[r.ID] = true
	}
	return rows
}

// end says that a row may be begun anew if it is still there.
func (e *express) end(id int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.busy, id)
}

func (e *express) write(ctx context.Context, rows []names.OutboxRow) {
	b := &batch{lane: e.lane, rows: rows}
	var wg sync.WaitGroup
	for _, j := range b.look(ctx) {
		wg.Go(func() {
			defer e.end(j.row.ID)
			select {
			case e.slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			defer func() { <-e.slots }()
			if err := e.writeOne(ctx, b, j); err != nil {
				e.x.log.Debug("a change that is waited for is not in the bucket yet", "bucket", e.name, "repository", j.row.Record.Repository, "error", err)
			}
		})
	}
	wg.Wait()
}

// writeOne writes a change of a batch, and tells who waits. One that fails is set aside by the rounds, which write it
// too.
func (e *express) writeOne(ctx context.Context, b *batch, j *job) error {
	if j.err == nil && j.do != nil {
		j.err = b.write(ctx, j, expressStall)
	}
	if j.err != nil && !j.stamped {
		return j.err
	}
	ctx, cancel := context.WithTimeout(ctx, expressStall)
	defer cancel()
	return (&batch{lane: e.lane}).finish(ctx, []*job{j})
}

// errStalled is a bucket that makes no progress.
var errStalled = errors.New("the bucket makes no progress")

// whileMoving returns b with a context for its calls that ends when nothing has moved there for stall: no call has
// ended, and no bytes or listed objects have gone by. The caller calls stop.
func whileMoving(ctx context.Context, b bucket.Bucket, stall time.Duration) (_ context.Context, _ bucket.Bucket, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	t := time.AfterFunc(stall, func() { cancel(errStalled) })
	return ctx, moving{b, func() { t.Reset(stall) }}, func() { t.Stop(); cancel(nil) }
}

// moving is a bucket that says when something moves.
type moving struct {
	bucket.Bucket
	moved func()
}

// Stat implements bucket.Bucket.
func (m moving) Stat(ctx context.Context, key string) (bucket.Object, error) {
	defer m.moved()
	return m.Bucket.Stat(ctx, key)
}

// Put implements bucket.Bucket.
func (m moving) Put(ctx context.Context, key string, r io.Reader) error {
	defer m.moved()
	if s, ok := r.(io.ReadSeeker); ok { // as those below it need for another try
		r = movingBody{s, m.moved}
	}
	return m.Bucket.Put(ctx, key, r)
}

// Delete implements bucket.Bucket.
func (m moving) Delete(ctx context.Context, key string) error {
	defer m.moved()
	return m.Bucket.Delete(ctx, key)
}

// List implements bucket.Bucket.
func (m moving) List(ctx context.Context, prefix, after string, fn func(bucket.Object) error) error {
	defer m.moved()
	return m.Bucket.List(ctx, prefix, after, func(o bucket.Object) error {
		m.moved()
		return fn(o)
	})
}

// movingBody is a body that says when it is read.
type movingBody struct {
	io.ReadSeeker
	moved func()
}

// Read implements io.Reader.
func (b movingBody) Read(p []byte) (int, error) {
	n, err := b.ReadSeeker.Read(p)
	if n > 0 {
		b.moved()
	}
	return n, err
}
