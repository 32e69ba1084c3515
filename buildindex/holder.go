package buildindex

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// One build-index writes names; a second one would take its records for left behind. A lock beside the database keeps
// out those on the same disk, a lease at the origins all others. Who comes second waits, answers 503 and says why.
//
// With the lease origins remember the last generation that was committed, and so does each bucket. A database that
// stands before that was brought back from an older copy.

const (
	holdFor   = 6 * time.Second // without a sign, until another may take over
	holdEvery = 2 * time.Second
	waitEvery = 500 * time.Millisecond // while another has the lock or the lease
	markWait  = 2 * time.Second        // for one bucket's answer at the start
	sureEvery = 50 * time.Millisecond  // while a request waits for the answers of origins

	metaHolder = "holder" // tells this database from others
	metaStale  = "stale"  // set while SQL is older than what it has acknowledged
)

// tenure is what makes this process the only build-index.
type tenure struct {
	id     string
	begun  chan struct{} // closed when it is
	asked  int64         // renewals that have begun
	acked  int64         // the last of them that succeeded: what was committed before is known outside SQL
	mu     sync.Mutex
	reason error     // why it has not begun
	waits  time.Time // since when
	told   string    // the reason that the log has
	forget forgets   // what origins may forget after a renewal that began later
	looked time.Time // when origins were asked last whether this is the only one, and none said no
	most   time.Time // when most of the origins were asked last that granted the lease
	ended  error     // what ended it
}

// errHeld is that another build-index has the lease at the origins.
var errHeld = errors.New("another build-index holds the origins")

// errGone is that this build-index ends, and has given its lease back.
var errGone = errors.New("this build-index ends: another one may have begun")

// errLapsed is that another build-index may have begun, and be gone again, while this one stood still: what that one
// has written this one does not know.
var errLapsed = errors.New("this build-index stood still for longer than its lease, and another may have begun meanwhile: it has to begin anew")

// begun reports whether this process is the only build-index.
func (x *Index) begunTenure() bool {
	select {
	case <-x.tenure.begun:
		return true
	default:
		return false
	}
}

// sure returns ErrUnavailable when another build-index may have taken over: this process stood still for as long as its
// lease holds, by one clock or the other, or has found out. Reads would be old, and who has taken over would not hear
// of changes.
func (x *Index) sure() error {
	t := &x.tenure
	t.mu.Lock()
	defer t.mu.Unlock()
	old := elapsed(t.looked, time.Now())
	switch {
	case t.looked.IsZero(): // nobody holds anything here
		return nil
	case t.ended != nil:
		return isAway(t.ended)
	case old > holdFor:
		return isAway(fmt.Errorf("this build-index stood still for %s: origins are asked whether it is still the only one", old.Round(time.Second)))
	}
	return nil
}

// isAway returns the ErrUnavailable of a build-index that begins or ends, is not sure to be the only one, or does not
// know yet what there is of a name: whoever has patience with a restart waits. What is away beside it (origins, a
// bucket, an upstream) is no such error.
func isAway(err error) error {
	return &registry.RetryError{Err: fmt.Errorf("%w: %w", registry.ErrUnavailable, err), After: time.Second, Away: true}
}

// look notes how a question to all origins has ended that began at a time: whether this is the only build-index. What
// they said may be as old as that. It returns what has ended this one.
//
// Where too few answered none said no. But after a time for which the lease does not hold another may have begun, and
// have gone since, and this one does not know what that has written. After a time without most of the origins one that
// says so is enough to end. Who stood still goes on only when most say that nobody else had the lease; what does not
// say so once is enough, because it does not say it twice.
func (x *Index) look(began time.Time, a answer, err error) error {
	t := &x.tenure
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	stood := !t.looked.IsZero() && elapsed(t.looked, now) > holdFor
	lapsed := !t.most.IsZero() && elapsed(t.most, now) > holdFor
	tooFew := errors.Is(err, registry.ErrUnavailable)
	switch {
	case t.ended != nil:
	case errors.Is(err, errHeld), errors.Is(err, errGone):
		t.ended = err
	case stood && !a.kept && (err == nil || tooFew), lapsed && a.other:
		t.ended = errLapsed
	case stood && tooFew:
	case err == nil, tooFew:
		t.looked = began
	}
	if t.ended == nil && err == nil {
		t.most = began
	}
	return t.ended
}

// elapsed is the time between two times, by the clock that only goes on or by the one on the wall: the longer one.
func elapsed(from, to time.Time) time.Duration {
	return max(to.Sub(from), to.Round(0).Sub(from.Round(0)))
}

// waitQuietly is how long a start may wait before the log tells of it: the parts of a cluster start in any order.
const waitQuietly = 3 * time.Second

// setReason notes why this process is not the only one. It is logged when it is new, once that has lasted.
func (x *Index) setReason(err error) {
	t := &x.tenure
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.reason = err; err == nil {
		return
	}
	if t.waits.IsZero() {
		t.waits = time.Now()
	}
	if text := err.Error(); text != t.told && time.Since(t.waits) >= waitQuietly {
		t.told = text
		x.log.Warn("this build-index waits", "error", err)
	}
}

// checkTenure is what readiness says of it.
func (x *Index) checkTenure(context.Context) error {
	if x.begunTenure() {
		return nil
	}
	x.tenure.mu.Lock()
	defer x.tenure.mu.Unlock()
	if x.tenure.reason != nil {
		return x.tenure.reason
	}
	return errors.New("origins are asked whether this is the only build-index")
}

// whenBegun lets requests in once this process is the only build-index. Those that come a moment before wait.
func (x *Index) whenBegun(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t := time.NewTimer(heardWait)
		defer t.Stop()
		select {
		case <-x.tenure.begun:
		case <-r.Context().Done():
		case <-t.C:
		}
		err := x.sure()
		for began := time.Now(); err != nil && time.Since(began) < heardWait && role.Pause(r.Context(), sureEvery); {
			err = x.sure()
		}
		if err == nil && x.begunTenure() {
			next.ServeHTTP(w, r)
			return
		}
		if err == nil {
			err = isAway(x.checkTenure(r.Context()))
		}
		dialect().WriteError(w, r, err)
	})
}

// hold makes this process the only build-index and keeps it so until ctx is done. It returns an error when another has
// taken over: what this one has acknowledged since is at the origins, and it must not go on.
func (x *Index) hold(ctx context.Context) error {
	for !x.begunTenure() {
		err := x.takeOver(ctx)
		if ctx.Err() != nil {
			return nil
		}
		x.setReason(err)
		if err != nil && !errors.Is(err, errBusy) && !errors.Is(err, errHeld) && !errors.Is(err, registry.ErrUnavailable) {
			return err
		}
		if err != nil && !role.Pause(ctx, waitEvery) {
			return nil
		}
	}
	x.log.Info("this is the only build-index", "holder", x.tenure.id)
	for began := time.Now(); role.Pause(ctx, time.Until(began.Add(holdEvery))); {
		began = time.Now()
		a, err := x.ask(ctx, holdFor)
		if err = x.look(began, a, err); err != nil {
			if errors.Is(err, errLapsed) {
				x.giveBack(ctx)
			}
			return err
		}
		notify(x.forgetSoon)
	}
	// The next one need not wait. What comes while this one drains is for that one.
	_ = x.look(time.Now(), answer{}, errGone) // as it is meant
	x.giveBack(ctx)
	return nil
}

// giveBack ends the lease where this build-index has it, also when ctx is done.
func (x *Index) giveBack(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), holdEvery)
	defer cancel()
	_, _ = x.renew(ctx, 0) // it ends by itself soon
}

// takeOver opens the database if that is still to do, asks for the lease, and looks whether SQL has all that was
// committed.
func (x *Index) takeOver(ctx context.Context) error {
	if !x.opened.Load() {
		if err := x.openDatabase(ctx); err != nil {
			return err
		}
	}
	if err := x.identify(ctx); err != nil {
		return err
	}
	latest, err := x.renew(ctx, holdFor)
	if err != nil {
		_, _ = x.renew(ctx, 0) // what was granted is given back: the holder may need it
		return err
	}
	if err := x.compare(ctx, latest); err != nil {
		return err
	}
	began, err := x.markBegin(ctx)
	if err != nil {
		x.giveBack(ctx)
		return err
	}
	_ = x.look(began, answer{kept: true}, nil) // it begins
	close(x.tenure.begun)
	return nil
}

// markBegin commits a generation of its own, and tells origins, before this build-index does anything: the database of
// another that comes back is older then, also if this one changes nothing but to publish what that one never committed.
// It returns when origins were asked.
func (x *Index) markBegin(ctx context.Context) (began time.Time, err error) {
	if n, err := x.nextGeneration(); err != nil {
		x.log.Warn("it can't be noted that this build-index has begun", "error", err)
	} else if err := x.db.Update(ctx, func(tx names.Tx) error { return tx.RaiseGeneration(n) }); err != nil {
		return began, err
	}
	began = time.Now()
	_, err = x.renew(ctx, holdFor)
	return began, err
}

// identify gives this database a name for the lease: a restart on the same disk, while the machine runs, need not wait
// for the end of its own.
func (x *Index) identify(ctx context.Context) error {
	id, err := x.db.Meta(ctx, metaHolder)
	if err != nil {
		return err
	}
	if id == "" {
		var b [8]byte
		if _, err := rand.Read(b[:]); err != nil {
			return err
		}
		id = hex.EncodeToString(b[:])
		if err := x.db.Update(ctx, func(tx names.Tx) error { return tx.SetMeta(metaHolder, id) }); err != nil {
			return err
		}
	}
	machine := x.cfg.Machine
	if machine == "" {
		if machine, err = x.machine(); err != nil {
			return err
		}
	}
	x.tenure.id = machine + "/" + id
	return nil
}

// machine tells this machine since it was booted, and the file of its lock, from all others. The database alone does
// not: a copy of it has the same name, and so may the machine that the copy is on.
func (x *Index) machine() (string, error) {
	host, err := os.Hostname()
	if err != nil {
		return "", err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	var lock syscall.Stat_t
	if err := syscall.Fstat(int(x.lockHeld.Fd()), &lock); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s/%s/%x-%x", host, strings.TrimSpace(string(boot)), lock.Dev, lock.Ino), nil
}

// renew asks all origins for the lease and tells them what SQL has committed. It returns the highest generation that
// any of them knows. errHeld when another has the lease; ErrUnavailable when replicas or half of all did not answer.
// An origin of a version that knows no leases has nothing against it.
//
// Who begins is refused by nobody, and granted by all but replicas - 1 and by most. Who has begun goes on as long as
// most grant it, whatever others say: the request of one that is gone may have reached them late. A few are not enough:
// in a restart they forget whose the lease is, and grant it to who asks first. Two never have most of the origins.
func (x *Index) renew(ctx context.Context, length time.Duration) (latest int64, err error) {
	a, err := x.ask(ctx, length)
	return a.latest, err
}

// answer is what origins have said together.
type answer struct {
	latest int64 // the highest generation that any of them knows
	kept   bool  // all that grant the lease remember this one as its last holder
	other  bool  // one remembers another
}

// ask is renew. What it says of the lease is true also beside an error.
func (x *Index) ask(ctx context.Context, length time.Duration) (out answer, err error) {
	x.tenure.mu.Lock()
	x.tenure.asked++
	renewal := x.tenure.asked
	x.tenure.mu.Unlock()
	state, err := x.db.State(ctx)
	if err != nil {
		return out, err
	}
	out.kept = true
	ask := cluster.HolderRequest{Holder: x.tenure.id, For: length, Generation: state.LastGeneration}
	all := x.origins.All()
	answers, errs := make([]cluster.HolderResponse, len(all)), make([]error, len(all))
	var wg sync.WaitGroup
	for i, o := range all {
		wg.Go(func() {
			ask, patience := ask, cluster.Stall
			ask.KeepPaid = !x.hasHeard(o)
			if !o.Answers() { // one that hangs must not make others' answers old
				patience = cluster.Stall / 4
			}
			answers[i], errs[i] = o.Hold(transport.WithProgressTimeout(ctx, patience), ask)
			var known *registry.Error
			if errors.As(errs[i], &known) && (known.Status == http.StatusNotFound || known.Status == http.StatusMethodNotAllowed) {
				answers[i], errs[i] = cluster.HolderResponse{Holder: ask.Holder, Before: ask.Holder}, nil // it knows no leases
			}
		})
	}
	wg.Wait()
	var silent []error
	granted := 0
	for i, a := range answers {
		switch {
		case errs[i] != nil:
			silent = append(silent, fmt.Errorf("origin %s: %w", all[i].ID, errs[i]))
		case a.Holder != ask.Holder:
			out.kept, out.other = false, true
			err = fmt.Errorf("%w: it is %.300s, as origin %s says: stop it and this one goes on", errHeld, a.Holder, all[i].ID)
		default:
			granted++
			out.kept, out.other = out.kept && a.Before == ask.Holder, out.other || a.Before != "" && a.Before != ask.Holder
			out.latest = max(out.latest, a.Generation)
			if !x.hasHeard(all[i]) {
				notify(x.hearSoon)
			}
		}
	}
	most := 2*granted > len(all)
	switch {
	case err != nil && x.begunTenure() && most:
		x.log.Info("an origin takes another build-index for the only one, for a moment", "says", err)
	case err != nil:
		return out, err
	}
	if len(silent) >= x.cfg.Replicas || !most {
		return out, fmt.Errorf("%w: too few origins answer to tell whether this is the only build-index: %w", registry.ErrUnavailable, errors.Join(silent...))
	}
	x.tenure.mu.Lock()
	x.tenure.acked = max(x.tenure.acked, renewal)
	x.tenure.mu.Unlock()
	return out, nil
}

// forgetLater makes origins forget records of changes that are committed, after a renewal that begins later: until then
// they are what tells that SQL is older.
func (x *Index) forgetLater(rs []cluster.NameRecord) {
	x.tenure.mu.Lock()
	defer x.tenure.mu.Unlock()
	for _, r := range rs {
		if !x.tenure.forget.add(r, x.tenure.asked) {
			x.short.remove(r)
		}
	}
}

// forgetting makes origins forget what may be forgotten after each renewal, until ctx is done. A renewal does not wait
// for it.
func (x *Index) forgetting(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-x.forgetSoon:
			x.forgetAcked(ctx)
		}
	}
}

// forgetAcked makes origins forget what may be forgotten.
func (x *Index) forgetAcked(ctx context.Context) {
	x.tenure.mu.Lock()
	now := x.tenure.forget.take(x.tenure.acked)
	x.tenure.mu.Unlock()
	x.forgetAll(ctx, now)
}

// maxForget bounds how many records wait for origins to be told the last generation. What is beyond is taken back by
// the comparison of each minute.
const maxForget = 1 << 14

// forgets are records that wait to be forgotten: of each key the last, because an origin forgets those before with it.
type forgets struct {
	by    map[string]leftover // by cluster.NameKey
	least int64               // no record came before this renewal
}

// leftover is a record whose change was committed before a renewal that had not begun when it came.
type leftover struct {
	cluster.NameRecord
	renewal int64 // the last that had begun
}

// add takes up a record after a renewal has begun. It reports whether there is room.
func (f *forgets) add(r cluster.NameRecord, renewal int64) bool {
	k := cluster.NameKey(r)
	was, ok := f.by[k]
	switch {
	case !ok && len(f.by) >= maxForget:
		return false
	case len(f.by) == 0:
		f.by, f.least = map[string]leftover{}, renewal
	case ok && was.Generation > r.Generation:
		r = was.NameRecord // with which the other goes, and not before that may
	}
	f.by[k], f.least = leftover{r, renewal}, min(f.least, renewal)
	return true
}

// take takes out the records that came before a renewal began.
func (f *forgets) take(renewal int64) (out []cluster.NameRecord) {
	if len(f.by) == 0 || f.least >= renewal {
		return nil
	}
	f.least = math.MaxInt64
	for k, r := range f.by {
		if r.renewal < renewal {
			out = append(out, r.NameRecord)
			delete(f.by, k)
		} else {
			f.least = min(f.least, r.renewal)
		}
	}
	return out
}

// compare looks whether SQL has everything that was ever committed, as origins and buckets remember it. If not it is an
// older copy, and what it has counts for nothing until it was merged with what buckets and origins have.
func (x *Index) compare(ctx context.Context, latest int64) error {
	state, err := x.db.State(ctx)
	if err != nil {
		return err
	}
	where := "origins"
	marks := make([]int64, len(x.lanes))
	var wg sync.WaitGroup
	for i, l := range x.lanes {
		b, ok := x.buckets.Get(l.name)
		if !ok {
			continue
		}
		wg.Go(func() { // at once: those of one store may all hang
			var err error
			if marks[i], err = l.readMark(ctx, b); err != nil {
				x.log.Warn("a bucket can't be asked whether the database is the latest; origins were", "bucket", l.name, "error", err)
			}
		})
	}
	wg.Wait()
	for i, n := range marks {
		if n > latest {
			latest, where = n, "bucket "+x.lanes[i].name
		}
	}
	if latest <= state.LastGeneration || state.LastGeneration == 0 && !x.restored.Load() {
		x.sawGeneration(latest)
		return nil
	}
	x.log.Warn("the database is older than what was acknowledged: it is merged with buckets and origins; until then what is asked for is looked up there first",
		"database", state.LastGeneration, "committed", latest, "says", where)
	err = x.db.Update(ctx, func(tx names.Tx) error {
		err := errors.Join(tx.SetMeta(metaStale, "yes"), tx.SetMeta(metaRestored, ""))
		return errors.Join(err, x.buckets.All(func(name string, _ bucket.Bucket) error { return setSweep(tx, name, sweep{}) }))
	})
	if err != nil {
		return err
	}
	x.sawGeneration(latest)
	x.stale.Store(true)
	x.restored.Store(false)
	return nil
}

// readMark returns the last generation that a bucket knows to be committed.
func (l *lane) readMark(ctx context.Context, b bucket.Bucket) (latest int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, markWait)
	defer cancel()
	limit := time.Now().Add(cluster.MaxGenerationSkew).UnixMicro()
	err = b.List(ctx, layout.GenerationsPrefix, "", func(o bucket.Object) error {
		if n, ok := layout.ParseGenerationKey(o.Key); ok && n <= limit {
			latest = max(latest, n)
		}
		return nil
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mark = max(l.mark, latest)
	return l.mark, err
}

// raiseMark makes a bucket know that SQL stands at generation n at least, before records of what was committed go.
// Several may do so at once: one that hangs holds up no other.
func (l *lane) raiseMark(ctx context.Context, b bucket.Bucket, n int64) error {
	l.mu.Lock()
	known := l.mark >= n
	l.mu.Unlock()
	if known {
		return nil
	}
	if err := b.Put(ctx, layout.GenerationKey(n), timestamp()); err != nil {
		return err
	}
	l.mu.Lock()
	old := l.mark
	switch {
	case n > old:
		l.mark = n
	case n < old:
		old = n // another has gone past it meanwhile
	default:
		old = 0
	}
	l.mu.Unlock()
	if old > 0 {
		return b.Delete(ctx, layout.GenerationKey(old))
	}
	return nil
}
