package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// StartUpload opens a session on as many origins as there are replicas: the owners where the digest is known, else any.
// It goes on with fewer when the others don't answer, as long as there is one. While build-index is away there is no
// upload: nobody could commit it.
func (p *Proxy) StartUpload(ctx context.Context, repo string, o registry.UploadOptions) (registry.Upload, error) {
	if err := p.namer.CheckPush(repo); err != nil {
		return registry.Upload{}, err
	}
	if err := p.index.Ping(ctx); err != nil {
		return registry.Upload{}, fmt.Errorf("%w: an upload could not be committed now: %w", registry.ErrUnavailable, err)
	}
	var candidates []*cluster.Origin
	if o.Digest != "" {
		candidates = p.origins.For(o.Digest)
	} else {
		candidates = p.shuffled()
	}
	asked := cluster.Ask(ctx, p.origins, candidates, p.replicas, cluster.Question[target]{Ask: func(ctx context.Context, c *cluster.Origin) (target, error) {
		u, err := c.StartUpload(ctx, repo, o)
		if err != nil {
			return target{}, fmt.Errorf("start upload at %s: %w", c.ID, err)
		}
		return target{part{c.ID, u.ID}, c}, nil
	}, Discard: func(late target) { p.forget(ctx, repo, late) }})
	p.silent(asked.Silent)
	var ts []target
	for _, a := range asked.Answers {
		ts = append(ts, a.Value)
	}
	errs := asked.Errs
	if asked.Final != nil {
		errs = append(errs, asked.Final)
	}
	if len(ts) == 0 {
		return registry.Upload{}, first(errs)
	}
	if len(ts) < p.replicas {
		p.m.short.Inc()
		p.log.Warn("upload starts with fewer copies than configured", "repository", repo, "copies", len(ts), "error", errors.Join(errs...))
	}
	return p.encode(repo, ts, 0), nil
}

// silent tells of origins that did not answer in time.
func (p *Proxy) silent(origins []*cluster.Origin) {
	for _, o := range origins {
		p.m.silent.Inc()
		p.log.Warn("an origin does not answer; others are asked first until it does", "origin", o.ID)
	}
}

// forget ends a session that was opened too late to be used. An origin ends it by itself where that fails.
func (p *Proxy) forget(ctx context.Context, repo string, t target) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.stall)
	defer cancel()
	if err := t.origin.AbortUpload(ctx, repo, t.Upload); err != nil {
		p.log.Debug("a session that came too late is left to end by itself", "origin", t.Origin, "error", err)
	}
}

// shuffled returns all origins, those in good health first, in random order.
func (p *Proxy) shuffled() []*cluster.Origin {
	// The order for a random digest is a random order that respects health.
	var seed [16]byte
	for i := range seed {
		seed[i] = byte(rand.Uint32())
	}
	return p.origins.For(digest.FromBytes(seed[:]))
}

// UploadStatus answers with the furthest copy. A copy that is behind has missed bytes and is left out of the session,
// as one that does not answer soon after another has.
func (p *Proxy) UploadStatus(ctx context.Context, repo, id string) (registry.Upload, error) {
	ts, err := p.open(repo, id)
	if err != nil {
		return registry.Upload{}, err
	}
	us, errs := ask(ctx, p, ts, p.stall/5, func(ctx context.Context, t target) (registry.Upload, error) {
		return t.origin.UploadStatus(ctx, repo, t.Upload)
	})
	return p.agree(repo, ts, us, errs)
}

// agree keeps the targets that stand at the furthest offset.
func (p *Proxy) agree(repo string, ts []target, us []registry.Upload, errs []error) (registry.Upload, error) {
	offset := int64(-1)
	for i := range ts {
		if errs[i] == nil {
			offset = max(offset, us[i].Offset)
		}
	}
	if offset < 0 {
		return registry.Upload{}, first(errs)
	}
	var kept []target
	for i, t := range ts {
		if errs[i] == nil && us[i].Offset == offset {
			kept = append(kept, t)
			continue
		}
		p.m.leftBehind.Inc()
		p.log.Warn("origin left behind in an upload", "origin", t.Origin, "repository", repo, "error", errs[i], "offset", us[i].Offset, "session_offset", offset)
	}
	return p.encode(repo, kept, offset), nil
}

// WriteUpload writes the chunk to every copy at once.
func (p *Proxy) WriteUpload(ctx context.Context, repo, id string, c registry.Chunk) (registry.Upload, error) {
	ts, err := p.open(repo, id)
	if err != nil {
		return registry.Upload{}, err
	}
	us := make([]registry.Upload, len(ts))
	errs, readErr := p.fanOut(ctx, body(c), ts, func(ctx context.Context, i int, r io.Reader) (err error) {
		us[i], err = ts[i].origin.WriteUpload(ctx, repo, ts[i].Upload, registry.Chunk{Offset: c.Offset, Length: c.Length, Body: r})
		return err
	})
	if readErr != nil {
		return registry.Upload{}, fmt.Errorf("%w: read chunk of repository %s from client: %w", registry.ErrBlobUploadInvalid, repo, readErr)
	}
	if re := outOfOrder(errs); re != nil {
		for i := range ts {
			var e *registry.RangeError
			if errors.As(errs[i], &e) {
				us[i], errs[i] = e.Upload, nil
			}
		}
		u, err := p.agree(repo, ts, us, errs)
		if err != nil {
			return registry.Upload{}, err
		}
		return registry.Upload{}, &registry.RangeError{Upload: u, Got: re.Got}
	}
	return p.agree(repo, ts, us, errs)
}

// fanOut streams a body to all targets, see fanOut. Origins that were left behind are asked last until they answer.
func (p *Proxy) fanOut(ctx context.Context, body io.Reader, ts []target, send func(ctx context.Context, i int, r io.Reader) error) ([]error, error) {
	errs, readErr := fanOut(ctx, body, destinations{n: len(ts), stall: p.stall, send: send, hangs: func(ctx context.Context, i int) bool {
		return ts[i].origin.Hangs(ctx, p.stall)
	}})
	for i, err := range errs {
		if errors.Is(err, errStalled) {
			p.origins.Suspect(ts[i].origin)
		}
	}
	return errs, readErr
}

// outOfOrder is the refusal of a chunk when no copy took it.
func outOfOrder(errs []error) *registry.RangeError {
	var re *registry.RangeError
	for _, err := range errs {
		if err == nil {
			return nil
		}
		errors.As(err, &re)
	}
	return re
}

// CommitUpload writes the last chunk and commits every copy, then makes the blob a member of the repository. It
// succeeds with the copies that could be committed; an origin whose other owner lacks a blob repairs that by itself.
func (p *Proxy) CommitUpload(ctx context.Context, repo, id string, d digest.Digest, c registry.Chunk) (v1.Descriptor, error) {
	ts, err := p.open(repo, id)
	if err != nil {
		return v1.Descriptor{}, err
	}
	ds := make([]v1.Descriptor, len(ts))
	errs, readErr := p.fanOut(ctx, uncut{body(c)}, ts, func(ctx context.Context, i int, r io.Reader) (err error) {
		last := registry.Chunk{Offset: c.Offset, Length: c.Length, Body: r}
		if c.Body == nil {
			last.Body = nil
		}
		ds[i], err = ts[i].origin.CommitUpload(ctx, repo, ts[i].Upload, d, last)
		return err
	})
	if readErr != nil {
		return v1.Descriptor{}, fmt.Errorf("%w: read last chunk of %s from client: %w", registry.ErrBlobUploadInvalid, d, readErr)
	}
	ok := slices.Index(errs, nil)
	if ok < 0 {
		if re := outOfOrder(errs); re != nil {
			u, err := p.UploadStatus(ctx, repo, id)
			if err != nil {
				return v1.Descriptor{}, err
			}
			return v1.Descriptor{}, &registry.RangeError{Upload: u, Got: re.Got}
		}
		return v1.Descriptor{}, first(errs)
	}
	var have []*cluster.Origin
	for i, err := range errs {
		if err == nil {
			have = append(have, ts[i].origin)
			continue
		}
		p.m.leftBehind.Inc()
		p.log.Warn("origin left behind in a commit", "origin", ts[i].Origin, "repository", repo, "digest", d, "error", err)
	}
	copies := p.makeGood(ctx, repo, ds[ok], have)
	if err := p.putLayer(ctx, repo, cluster.Layer{Digest: d, Size: ds[ok].Size, Copies: copies}); err != nil {
		return v1.Descriptor{}, fmt.Errorf("make %s a member of %s: %w", d, repo, err)
	}
	return ds[ok], nil
}

// keptPatience is for how long a commit waits for the bucket to have a blob that too few origins keep: many clients and
// gateways give a request up that is not answered within half a minute.
const keptPatience = 20 * time.Second

// putLayer makes a blob a member of a repository. One that too few origins keep is no member before the bucket has it:
// it is asked for again for a while, since a client that is refused sends all the bytes once more.
func (p *Proxy) putLayer(ctx context.Context, repo string, l cluster.Layer) error {
	_, err := transport.AskAgain(ctx, keptPatience, func(err error) bool { return errors.Is(err, registry.ErrTooFewCopies) }, func() (struct{}, error) {
		return struct{}{}, p.index.PutLayer(ctx, repo, l)
	})
	return err
}

// makeGood brings a blob that was committed in fewer copies than configured to further origins, so that a 201 means as
// many copies as ever while that many origins work. It asks only origins that answer, and returns how many owe the blob
// then. Fewer are no error: the origin that has it brings it to the bucket, and to the others when they are back.
func (p *Proxy) makeGood(ctx context.Context, repo string, b v1.Descriptor, have []*cluster.Origin) int {
	for _, to := range p.origins.For(b.Digest) {
		if len(have) >= p.replicas {
			return len(have)
		}
		if slices.Contains(have, to) || !to.Answers() {
			continue
		}
		if err := p.copyBlob(ctx, repo, b, have[0], to); err != nil {
			p.log.Warn("a lost copy could not be made good", "from", have[0].ID, "to", to.ID, "digest", b.Digest, "error", err)
			continue
		}
		p.m.madeGood.Inc()
		have = append(have, to)
	}
	if len(have) < p.replicas {
		p.m.short.Inc()
		p.log.Warn("a blob waits for the bucket, because fewer origins than configured keep it", "repository", repo, "digest", b.Digest, "copies", len(have))
	}
	return len(have)
}

// copyBlob brings a blob from one origin to another, which owes it to the bucket from then on.
func (p *Proxy) copyBlob(ctx context.Context, repo string, b v1.Descriptor, from, to *cluster.Origin) error {
	ctx = transport.WithProgressTimeout(ctx, p.stall)
	c, err := from.LocalOpen(ctx, repo, b.Digest, registry.Whole)
	if err != nil {
		return err
	}
	return errors.Join(to.Replicate(ctx, repo, b.Digest, c.Size, true, c.Body), c.Close())
}

// AbortUpload ends the session on every origin. One that hangs ends it by itself.
func (p *Proxy) AbortUpload(ctx context.Context, repo, id string) error {
	ts, err := p.open(repo, id)
	if err != nil {
		return err
	}
	_, errs := ask(ctx, p, ts, p.stall, func(ctx context.Context, t target) (struct{}, error) {
		return struct{}{}, t.origin.AbortUpload(ctx, repo, t.Upload)
	})
	if slices.Contains(errs, nil) {
		return nil
	}
	return first(errs)
}

func body(c registry.Chunk) io.Reader {
	if c.Body == nil {
		return eof{}
	}
	return c.Body
}

type eof struct{}

func (eof) Read([]byte) (int, error) { return 0, io.EOF }

// uncut is a body that must come whole. fanOut takes a cut one for ended, and so every copy of a chunk keeps what came;
// a commit of it would end the session for its digest.
type uncut struct{ io.Reader }

var errCut = errors.New("the body was cut")

func (u uncut) Read(p []byte) (int, error) {
	n, err := u.Reader.Read(p)
	if err == io.ErrUnexpectedEOF {
		err = errCut
	}
	return n, err
}

// ask asks all targets at once and returns what each answered, in their order. One that is silent for the stall
// timeout, or for after once another has answered, is given up with errStalled, and asked last by others until it
// answers.
func ask[T any](ctx context.Context, p *Proxy, ts []target, after time.Duration, question func(context.Context, target) (T, error)) ([]T, []error) {
	answers, errs := make([]T, len(ts)), make([]error, len(ts))
	var all []int
	for i := range ts {
		all = append(all, i)
	}
	bounded := transport.WithProgressTimeout(ctx, p.stall)
	asked := transport.Ask(bounded, all, transport.Hedge{Want: len(ts), Stall: after}, transport.Question[int, struct{}]{Ask: func(ctx context.Context, i int) (_ struct{}, err error) {
		answers[i], err = question(ctx, ts[i])
		errs[i] = err
		return struct{}{}, err
	}})
	var silent []*cluster.Origin
	for i, err := range errs {
		if err != nil && (slices.Contains(asked.Silent, i) && ctx.Err() == nil || errors.Is(err, transport.ErrNoProgress)) {
			errs[i] = errStalled
			p.origins.Suspect(ts[i].origin)
			silent = append(silent, ts[i].origin)
		}
	}
	p.silent(silent)
	return answers, errs
}

// first picks the error to answer with: what the client did wrong, if any origin says so, else that none could be
// reached.
func first(errs []error) error {
	for _, err := range errs {
		if err != nil && !errors.Is(err, registry.ErrUnavailable) && !errors.Is(err, errStalled) && !errors.Is(err, registry.ErrInternal) {
			return err
		}
	}
	return unavailable(errs)
}

func unavailable(errs []error) error {
	return fmt.Errorf("%w: %w", registry.ErrUnavailable, errors.Join(errs...))
}
