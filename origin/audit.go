package origin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"strings"
	"time"

	"github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"

	"kraken/origin/bucket"
	"kraken/origin/store"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// AuditOptions says what an audit looks at.
type AuditOptions struct {
	// BuildIndex is the URL of the build-index whose memberships are audited.
	BuildIndex string
	// Repository is the only one that is audited; empty for all.
	Repository string
	// SizeOnly takes an object of the right size without reading it, where the bucket does not keep its digest.
	SizeOnly bool
}

// AuditReport is the sum of an audit.
type AuditReport struct {
	Repositories, Members int
	InBucket              int // verified
	BySize                int // in the bucket, by their size alone
	Owed                  int // not in the bucket yet, and owed by enough origins
	Missing               int // neither
	Unknown               int // somebody who may have or owe it did not answer
}

// AuditError is an audit that did not find everything where it should be.
type AuditError struct{ AuditReport }

func (e *AuditError) Error() string {
	return fmt.Sprintf("%d of %d members are neither in the bucket nor owed by enough origins, of %d that is not known", e.Missing, e.Members, e.Unknown)
}

// ExitCode is 1 where members are missing, 2 where that is not known.
func (e *AuditError) ExitCode() int {
	if e.Missing > 0 {
		return 1
	}
	return 2
}

// auditor compares what build-index says with what the buckets and the origins have. It keeps no more than a page of
// memberships, and the digests that it has seen in a bucket lately.
type auditor struct {
	opt     AuditOptions
	origins *cluster.Origins
	index   *cluster.IndexClient
	buckets *bucket.Set
	seen    *lru.Cache[string, bool] // "bucket digest" → verified, of what many repositories have
	out     io.Writer
	sum     AuditReport
}

const (
	auditPage = 1000
	auditSeen = 100_000
	askWithin = 10 * time.Second
)

// Audit asks of each member of each repository whether it is in the repository's bucket, verified, or owed to it by as
// many origins as there are replicas. It writes a line to out for each member of which neither holds, and the sum. It
// touches no store. The error is an *AuditError when members are missing, or when it is not known of some.
func Audit(ctx context.Context, cfg Config, opt AuditOptions, out io.Writer) (AuditReport, error) {
	if u, err := url.Parse(opt.BuildIndex); err != nil || u.Host == "" {
		return AuditReport{}, fmt.Errorf("build-index %q: want a URL such as http://build-index:16010", opt.BuildIndex)
	}
	hc, err := transport.NewClient(cfg.Client, slog.New(slog.DiscardHandler))
	if err != nil {
		return AuditReport{}, fmt.Errorf("client: %w", err)
	}
	defer hc.CloseIdleConnections()
	a := &auditor{opt: opt, out: out}
	if a.index, err = cluster.NewIndexClient(strings.TrimSuffix(opt.BuildIndex, "/"), hc); err != nil {
		return AuditReport{}, err
	}
	if a.origins, err = cluster.NewOrigins(cfg.Origins, cfg.Replicas, cluster.Stall, hc); err != nil {
		return AuditReport{}, err
	}
	if a.buckets, err = bucket.OpenAll(ctx, cfg.Buckets, nil); err != nil {
		return AuditReport{}, err
	}
	if a.seen, err = lru.New[string, bool](auditSeen); err != nil {
		return AuditReport{}, err
	}
	if err := a.all(ctx); err != nil {
		return a.sum, err
	}
	if a.sum.Missing+a.sum.Unknown > 0 {
		return a.sum, &AuditError{a.sum}
	}
	return a.sum, nil
}

func (a *auditor) all(ctx context.Context) error {
	if a.opt.Repository != "" {
		return a.repository(ctx, a.opt.Repository)
	}
	for page := (registry.Page{N: auditPage}); ; {
		repos, err := a.index.ListRepositories(ctx, page)
		if err != nil {
			return fmt.Errorf("list repositories: %w", err)
		}
		for _, repo := range repos.Names {
			if err := a.repository(ctx, repo); err != nil {
				return err
			}
		}
		if !repos.More || len(repos.Names) == 0 {
			return nil
		}
		page.Last = cmp.Or(repos.Next, repos.Names[len(repos.Names)-1])
	}
}

func (a *auditor) repository(ctx context.Context, repo string) error {
	a.sum.Repositories++
	for last := digest.Digest(""); ; {
		members, err := a.index.ListLayers(ctx, repo, last, auditPage)
		if err != nil {
			return fmt.Errorf("list the members of %s: %w", repo, err)
		}
		for _, l := range members {
			if err := a.member(ctx, repo, l); err != nil {
				return err
			}
		}
		if len(members) == 0 {
			return nil
		}
		last = members[len(members)-1].Digest
	}
}

// place is where a member was found.
type place int

const (
	nowhere place = iota
	inBucketVerified
	inBucketBySize
)

// member says where one membership's blob is. Its own error is that of ctx, or of out.
func (a *auditor) member(ctx context.Context, repo string, l cluster.Layer) error {
	a.sum.Members++
	at, berr := a.inBuckets(ctx, repo, l)
	owed, oerr := 0, error(nil)
	if at == nowhere {
		if owed, oerr = a.owedBy(ctx, repo, l); owed < a.enough() {
			at, berr = a.inBuckets(ctx, repo, l) // it may have been written back since
		}
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	var text string
	switch unsure := errors.Join(berr, oerr); {
	case at == inBucketVerified:
		a.sum.InBucket++
	case at == inBucketBySize:
		a.sum.BySize++
	case owed >= a.enough():
		a.sum.Owed++
	case unsure != nil:
		a.sum.Unknown++
		text = fmt.Sprintf("unknown\t%s\t%s\towed by %d of %d: %v", repo, l.Digest, owed, a.enough(), unsure)
	default:
		a.sum.Missing++
		text = fmt.Sprintf("missing\t%s\t%s\towed by %d of %d", repo, l.Digest, owed, a.enough())
	}
	if text == "" {
		return nil
	}
	_, err := fmt.Fprintln(a.out, strings.ReplaceAll(text, "\n", "; "))
	return err
}

// enough is how many origins must owe what is not in the bucket yet.
func (a *auditor) enough() int { return min(a.origins.Ring().Replicas(), len(a.origins.All())) }

// inBuckets looks for a blob in the bucket of a repository, then in the others: bytes are global.
func (a *auditor) inBuckets(ctx context.Context, repo string, l cluster.Layer) (place, error) {
	own, _, _ := a.buckets.For(repo)
	var errs []error
	found := nowhere
	look := func(name string, b bucket.Bucket) {
		at, err := a.inBucket(ctx, name, b, l)
		if err != nil {
			errs = append(errs, err)
		}
		if found == nowhere || at == inBucketVerified {
			found = at
		}
	}
	if b, ok := a.buckets.Get(own); ok {
		look(own, b)
	}
	_ = a.buckets.All(func(name string, b bucket.Bucket) error { // which fails only when its callback does
		if name != own && found == nowhere {
			look(name, b)
		}
		return nil
	})
	return found, errors.Join(errs...)
}

func (a *auditor) inBucket(ctx context.Context, name string, b bucket.Bucket, l cluster.Layer) (place, error) {
	key := name + " " + l.Digest.String()
	if verified, ok := a.seen.Get(key); ok {
		if verified {
			return inBucketVerified, nil
		}
		return inBucketBySize, nil
	}
	at := inBucketVerified
	if a.opt.SizeOnly {
		obj, err := b.Stat(ctx, layout.BlobKey(l.Digest))
		switch {
		case errors.Is(err, bucket.ErrNotFound), err == nil && obj.Size != l.Size:
			return nowhere, nil
		case err != nil:
			return nowhere, err
		case obj.Digest != l.Digest:
			at = inBucketBySize
		}
	} else if ok, err := hasVerified(ctx, b, l.Digest, store.SizeUnknown); err != nil || !ok {
		return nowhere, err
	}
	a.seen.Add(key, at == inBucketVerified)
	return at, nil
}

// owedBy is how many origins owe a blob for a repository. The error says who did not answer.
func (a *auditor) owedBy(ctx context.Context, repo string, l cluster.Layer) (n int, err error) {
	var errs []error
	for _, o := range a.origins.All() {
		ctx, cancel := context.WithTimeout(ctx, askWithin)
		_, err := o.Owes(ctx, repo, l.Digest)
		cancel()
		switch {
		case err == nil:
			n++
		case errors.Is(err, registry.ErrBlobUnknown):
		default:
			errs = append(errs, fmt.Errorf("origin %s: %w", o.ID, err))
		}
	}
	return n, errors.Join(errs...)
}
