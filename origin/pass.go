package origin

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/proto/blob"
	"kraken/proto/registry"
)

// passing reads one blob of an upstream for one reader and keeps nothing. A reader of the whole gets the last byte once
// all were verified; one of a part gets what comes. One goroutine uses it. Close must be called.
type passing struct {
	ctx    context.Context
	end    context.CancelFunc
	place  passedSource
	size   int64
	pos    int64
	from   *parts // nil after a jump
	hash   hash.Hash
	hashed int64 // so many first bytes are in hash
}

// passedSource is a blob at an upstream that is read for one reader. Who goes away while the upstream says nothing
// leaves the question behind, one for each registry: so this origin learns that an upstream hangs also where readers
// lose patience before.
type passedSource struct {
	upstreamSource
	o *Origin
}

// opened is what came of opening a blob.
type opened struct {
	body io.ReadCloser
	size int64
	err  error
}

// open implements blobSource: ctx bounds the life of the body.
func (p passedSource) open(ctx context.Context, off, n int64) (io.ReadCloser, int64, error) {
	slot, err := p.registry.Slot(ctx)
	if err != nil {
		return nil, 0, err
	}
	own, end := context.WithCancelCause(context.WithoutCancel(ctx))
	came := make(chan opened)
	if !p.o.Background(func(origin context.Context) {
		defer context.AfterFunc(origin, func() { end(errShuttingDown) })()
		a := p.ask(own, end, slot, off, n)
		select {
		case came <- a:
		case <-ctx.Done():
			if a.body != nil {
				a.body.Close()
			}
			end(nil)
		}
	}) {
		slot()
		end(nil)
		return nil, 0, errShuttingDown
	}
	select {
	case a := <-came:
		if a.body == nil {
			end(nil)
			return nil, 0, a.err
		}
		alone := context.AfterFunc(ctx, func() { end(context.Cause(ctx)) })
		return passedBody{a.body, func() { alone(); end(nil) }}, a.size, a.err
	case <-ctx.Done():
		if over, err := p.o.behind.Take(p.registry); err == nil {
			context.AfterFunc(own, over)
		} else {
			end(context.Cause(ctx))
		}
		return nil, 0, context.Cause(ctx)
	}
}

// ask opens the blob with own, which end ends when the upstream says nothing for too long, and remembers the answer.
func (p passedSource) ask(own context.Context, end context.CancelCauseFunc, slot func(), off, n int64) (a opened) {
	limit := time.AfterFunc(p.o.patience, func() { end(errUpstreamHangs) })
	defer limit.Stop()
	a.body, a.size, a.err = p.openIn(own, slot, off, n)
	noted := a.err
	if errors.Is(noted, errNoRange) {
		noted = nil
	}
	p.o.answers.note(p.question(p.digest), a.size, noted, p.negativeTTL())
	return a
}

// passedBody is a body that ends its context when it is closed.
type passedBody struct {
	io.ReadCloser
	end func()
}

func (b passedBody) Close() error {
	defer b.end()
	return b.ReadCloser.Close()
}

// pass opens a blob of an upstream that is not kept, where its reader begins.
func (o *Origin) pass(ctx context.Context, up mirrored, d digest.Digest, hint registry.Range) (*registry.Content, error) {
	q := up.question(d)
	if err := o.lately(q); err != nil {
		return nil, err
	}
	o.m.passed.Inc()
	p := &passing{place: passedSource{upstreamSource{up, d}, o}, hash: d.Algorithm().Hash()}
	p.ctx, p.end = context.WithCancel(ctx)
	at := max(hint.Offset, 0)
	body, size, err := p.place.open(p.ctx, at, -1)
	if err != nil && !errors.Is(err, errNoRange) && at > 0 && !isNo(err) && ctx.Err() == nil { // it may have no such byte
		at = 0
		body, size, err = p.place.open(p.ctx, at, -1)
	}
	skip := int64(0)
	if errors.Is(err, errNoRange) {
		skip, err = at, nil
	}
	if err != nil {
		p.end()
		return nil, err
	}
	p.size, p.from = size, newParts(p.ctx, p.place, size)
	p.from.body, p.from.pos, p.from.skip = body, at, skip
	return &registry.Content{Digest: d, Size: size, Body: p, Close: p.Close}, nil
}

// Seek implements io.Seeker; it moves no bytes.
func (p *passing) Seek(off int64, whence int) (int64, error) {
	off, err := blob.Seek(off, whence, p.pos, p.size)
	if err == nil {
		p.pos = off
	}
	return off, err
}

// Read implements io.Reader.
func (p *passing) Read(b []byte) (int, error) {
	if p.pos >= p.size {
		return 0, io.EOF
	}
	if p.from != nil && p.from.pos != p.pos {
		p.from.Close()
		p.from = nil
	}
	if p.from == nil {
		p.from = newParts(p.ctx, p.place, p.size)
		p.from.pos = p.pos
	}
	n := min(int64(len(b)), p.size-p.pos)
	whole := p.hashed == p.pos
	if whole && n > 1 && p.pos+n == p.size {
		n-- // the last byte by itself
	}
	k, err := p.from.Read(b[:n])
	p.pos += int64(k)
	if whole {
		p.hash.Write(b[:k])
		p.hashed += int64(k)
		if k > 0 && p.hashed == p.size && digest.NewDigest(p.place.digest.Algorithm(), p.hash) != p.place.digest {
			return 0, fmt.Errorf("%w: pass on %s: %w", registry.ErrUnavailable, p.place.digest, store.ErrDigestMismatch)
		}
	}
	if errors.Is(err, io.EOF) && p.pos < p.size {
		err = io.ErrUnexpectedEOF
	}
	return k, err
}

// Close ends the reading.
func (p *passing) Close() error {
	p.end()
	if p.from == nil {
		return nil
	}
	return p.from.Close()
}
