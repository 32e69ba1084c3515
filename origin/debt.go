package origin

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// To have a blob and to owe it to the bucket are two facts. At each moment an acknowledged blob is in its bucket,
// verified, or owed by as many origins that hold it whole as there are replicas; so a debt is handed over before it is
// dropped, and who takes it over says so.

// debtRoute answers what this origin owes of a blob, and takes debts over.
func (o *Origin) debtRoute(w http.ResponseWriter, r *http.Request, _ string, d digest.Digest) error {
	var debt cluster.Debt
	var err error
	switch r.Method {
	case http.MethodGet:
		debt, err = o.owes(d)
	case http.MethodPut:
		if err := decode(r, cluster.MaxDebt*512, &debt); err != nil {
			return err
		}
		debt, err = o.takeDebt(r.Context(), d, debt)
	default:
		err = fmt.Errorf("%w: %s debt", registry.ErrUnsupported, r.Method)
	}
	if err != nil {
		return err
	}
	return transport.WriteJSON(w, http.StatusOK, debt)
}

// owes returns all that this origin owes of a blob that it holds whole, for any number of repositories. ErrBlobUnknown
// when it does not hold it or owes nothing.
func (o *Origin) owes(d digest.Digest) (cluster.Debt, error) {
	m, err := o.store.Marker(d)
	if err != nil {
		return cluster.Debt{}, wire(err)
	}
	i, err := o.store.Stat(d)
	if err != nil { // its file is lost here
		return cluster.Debt{}, wire(err)
	}
	return cluster.Debt{Repositories: m.Repositories, Since: m.Created, Size: i.Size}, nil
}

// takeDebt makes this origin owe a blob that it holds whole, for further repositories. What it returns is durable.
func (o *Origin) takeDebt(ctx context.Context, d digest.Digest, debt cluster.Debt) (cluster.Debt, error) {
	if len(debt.Repositories) == 0 || len(debt.Repositories) > cluster.MaxDebt {
		return debt, fmt.Errorf("%w: %d repositories, want 1 to %d", errBody, len(debt.Repositories), cluster.MaxDebt)
	}
	m, err := o.markerFor(debt)
	if err != nil {
		return debt, err
	}
	if err := o.boundDebt(d, debt); err != nil {
		return debt, err
	}
	i, err := o.store.Stat(d)
	if err != nil {
		return debt, wire(err)
	}
	if i.Size != debt.Size {
		return debt, fmt.Errorf("%w: blob %s has %d bytes here, %d at who hands it over", registry.ErrUnavailable, d, i.Size, debt.Size)
	}
	if err := o.vouch(ctx, d, debt); err != nil {
		return debt, err
	}
	if err := o.store.Mark(d, m); err != nil {
		return debt, wire(err)
	}
	o.wake()
	return debt, nil
}

// hashedInDebt is the size in bytes up to which a blob is hashed before the answer to who hands its debt over: a larger
// one takes longer than other origins wait, and is hashed in the background.
const hashedInDebt = 64 << 20

// vouchedFor is how long a large blob that was hashed is believed to be right: longer than who hands a debt over takes
// to ask again.
const vouchedFor = time.Minute

// vouch hashes a blob before this origin owes it in the place of another: that one drops its copy, and this one may
// have rotted. ErrBlobUnknown when it has; ErrUnavailable while a large one is being hashed. Who is about to drop its
// copy asks once, when all others owe the blob already; what was found before that is out of date.
func (o *Origin) vouch(ctx context.Context, d digest.Digest, debt cluster.Debt) error {
	m, err := o.store.Marker(d)
	owes := err == nil && !slices.ContainsFunc(debt.Repositories, func(r string) bool { return !slices.Contains(m.Repositories, r) })
	last, ok := o.vouched.Get(d)
	if owes && !debt.Leaving || ok && debt.Size > hashedInDebt && time.Since(last) < vouchedFor {
		r, err := o.store.Open(d) // the file may be gone, or short
		if err != nil {
			return wire(err)
		}
		return r.Close()
	}
	hash := func(ctx context.Context) error {
		r, err := o.store.OpenVerified(ctx, d)
		if err != nil {
			return wire(err)
		}
		return r.Close()
	}
	if debt.Size <= hashedInDebt {
		return hash(ctx)
	}
	if _, busy := o.vouching.LoadOrStore(d, true); !busy {
		o.Background(func(ctx context.Context) {
			defer o.vouching.Delete(d)
			if err := hash(ctx); err != nil {
				o.log.Warn("a blob was not verified, so its debt is not taken over", "digest", d, "error", err)
				return
			}
			o.vouched.Add(d, time.Now())
		})
	}
	return &registry.RetryError{Err: fmt.Errorf("%w: blob %s is being verified", registry.ErrUnavailable, d), After: time.Second, Expected: true}
}

// maxOwed bounds the repositories for which one blob is owed on somebody's word: each is kept, in memory and on disk.
const maxOwed = 10 * cluster.MaxDebt

// boundDebt returns ErrTooManyRequests for a debt that would have a blob owed for more repositories than maxOwed.
func (o *Origin) boundDebt(d digest.Digest, debt cluster.Debt) error {
	old, err := o.store.Marker(d)
	if err != nil || len(old.Repositories)+len(debt.Repositories) <= maxOwed {
		return nil
	}
	all := map[string]bool{}
	for _, r := range slices.Concat(old.Repositories, debt.Repositories) {
		all[r] = true
	}
	if len(all) > maxOwed {
		return fmt.Errorf("%w: blob %s is owed for %d repositories already", registry.ErrTooManyRequests, d, len(old.Repositories))
	}
	return nil
}

// markerFor is the marker of a debt that another origin has.
func (o *Origin) markerFor(debt cluster.Debt) (m store.Marker, err error) {
	for _, repo := range debt.Repositories {
		if err := registry.CheckName(repo); err != nil {
			return m, err
		}
		one, err := o.marker(repo)
		if err != nil {
			return m, err
		}
		m.Repositories = append(m.Repositories, repo)
		if !slices.Contains(m.Targets, one.Targets[0]) {
			m.Targets = append(m.Targets, one.Targets[0])
		}
		m.Created = one.Created
	}
	if debt.Since.Before(m.Created) { // a clock may be ahead
		m.Created = debt.Since
	}
	slices.Sort(m.Repositories)
	slices.Sort(m.Targets)
	return m, nil
}

// handOver makes another origin owe a blob for all repositories of a debt of this one. It gets the bytes where it lacks
// them. leaving says that this one drops its copy then.
func (o *Origin) handOver(ctx context.Context, or *cluster.Origin, d digest.Digest, m store.Marker, leaving bool) error {
	if !or.Answers() {
		return fmt.Errorf("hand the debt of %s over to %s: %w: it does not answer", d, or.ID, registry.ErrUnavailable)
	}
	i, err := o.store.Stat(d)
	if err != nil {
		return err
	}
	ctx = transport.WithProgressTimeout(ctx, cluster.Stall) // the bucket waits meanwhile
	debt := cluster.Debt{Repositories: m.Repositories, Since: m.Created, Size: i.Size, Leaving: leaving}
	err = or.TakeDebt(ctx, d, debt)
	switch {
	case errors.Is(err, registry.ErrBlobUnknown):
		if err := o.give(ctx, or, d, m.Repositories[:1]); err != nil {
			return err
		}
		if len(m.Repositories) > 1 { // the first came with the bytes
			err = or.TakeDebt(ctx, d, debt)
		} else {
			err = nil
		}
	case errors.Is(err, registry.ErrUnsupported): // of an older version: it takes a debt with the bytes only
		err = o.give(ctx, or, d, m.Repositories)
	}
	if errors.Is(err, transport.ErrNoProgress) {
		o.origins.Suspect(or)
	}
	if err != nil {
		return fmt.Errorf("hand the debt of %s over to %s: %w", d, or.ID, err)
	}
	return nil
}

// give copies a blob to another origin, with the debt for some repositories.
func (o *Origin) give(ctx context.Context, or *cluster.Origin, d digest.Digest, repos []string) error {
	for _, repo := range repos {
		c, err := o.local(d)
		if err != nil {
			return err
		}
		err = or.Replicate(ctx, repo, d, c.Size, true, c.Reader())
		c.Close()
		if err != nil {
			return fmt.Errorf("copy %s to %s: %w", d, or.ID, err)
		}
	}
	o.m.replicated.Inc()
	return nil
}

// debtOf is the debt of a copy that comes from another origin: what that one owes of it. Nil when it owes nothing.
func (o *Origin) debtOf(ctx context.Context, or *cluster.Origin, repo string, d digest.Digest) (*store.Marker, error) {
	if !or.Answers() {
		return nil, fmt.Errorf("ask %s what it owes of %s: %w", or.ID, d, errNotAsked)
	}
	debt, err := or.Owes(transport.WithProgressTimeout(ctx, cluster.Stall), repo, d)
	switch {
	case errors.Is(err, registry.ErrBlobUnknown), errors.Is(err, registry.ErrUnsupported):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("ask what is owed of %s: %w", d, o.heard(or, err))
	case len(debt.Repositories) == 0:
		return nil, nil
	}
	m, err := o.markerFor(debt)
	if err != nil {
		return nil, err
	}
	return &m, nil
}
