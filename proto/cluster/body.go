package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
	"kraken/proto/transport"
)

// OpenBlob implements registry.Blobs. When an origin breaks off, or nothing comes from it for the stall timeout, the
// body goes on at another, so that a reader is failed only when none can go on.
func (o *Origins) OpenBlob(ctx context.Context, repo string, d digest.Digest, hint registry.Range) (*registry.Content, error) {
	b := &body{o: o, ctx: ctx, repo: repo, digest: d, left: o.For(d)}
	if err := b.open(hint); err != nil {
		return nil, err
	}
	b.size = b.cur.Size
	return &registry.Content{Digest: d, Size: b.size, Body: b, Close: b.Close, Plan: b.reads}, nil
}

// body is a blob at whichever origin gives it.
type body struct {
	o      *Origins
	ctx    context.Context
	repo   string
	digest digest.Digest
	size   int64

	left []*Origin // that have not failed this reader
	pos  int64     // where the reader wants to be
	plan []registry.Range
	err  error // why the current origin can't go on

	mu     sync.Mutex // Close may come while a Read waits
	cur    *registry.Content
	from   *Origin
	closed bool
}

var errBodyClosed = errors.New("blob body is closed")

// open begins to read r at one of the origins that are left.
func (b *body) open(r registry.Range) error {
	c, from, err := first(b.ctx, b.o, b.digest, b.left, Question[*registry.Content]{Ask: func(ctx context.Context, or *Origin) (*registry.Content, error) {
		if len(b.left) > 1 {
			ctx = transport.WithProgressTimeout(ctx, b.o.stall)
		}
		return or.OpenBlob(ctx, b.repo, b.digest, r)
	}, Discard: func(late *registry.Content) { _ = late.Close() }})
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return errors.Join(errBodyClosed, c.Close())
	}
	b.cur, b.from = c, from
	return nil
}

// reads is Content.Plan.
func (b *body) reads(plan []registry.Range) {
	b.plan = plan
	if b.cur.Plan != nil {
		b.cur.Plan(plan)
	}
}

// Read reads on, at another origin where the current one has failed.
func (b *body) Read(p []byte) (int, error) {
	if b.pos >= b.size {
		return 0, io.EOF
	}
	for {
		if b.err != nil {
			if err := b.goOn(); err != nil {
				return 0, err
			}
		}
		n, err := b.cur.Body.Read(p)
		b.pos += int64(n)
		if err == nil || err == io.EOF && b.pos >= b.size || b.ctx.Err() != nil || b.isClosed() {
			return n, err
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if b.err = err; n > 0 {
			return n, nil
		}
	}
}

// goOn opens the blob at another origin than the current one, which has failed with b.err.
func (b *body) goOn() error {
	b.mu.Lock()
	failed, from := b.cur, b.from
	b.mu.Unlock()
	if errors.Is(b.err, transport.ErrNoProgress) {
		b.o.probes.suspect(from)
	}
	b.left = slices.DeleteFunc(slices.Clone(b.left), func(or *Origin) bool { return or == from })
	if len(b.left) == 0 {
		return b.err
	}
	if err := failed.Close(); err != nil && !errors.Is(err, b.err) {
		b.err = errors.Join(b.err, err)
	}
	if err := b.open(registry.Range{Offset: b.pos, Length: -1}); err != nil {
		return fmt.Errorf("%w; before, origin %s: %w", err, from.ID, b.err)
	}
	if b.cur.Size != b.size {
		return fmt.Errorf("%w: blob %s has %d bytes at origin %s and %d at %s", registry.ErrUnavailable, b.digest, b.size, from.ID, b.cur.Size, b.from.ID)
	}
	if b.plan != nil && b.cur.Plan != nil {
		b.cur.Plan(b.plan)
	}
	_, err := b.cur.Body.Seek(b.pos, io.SeekStart)
	b.err = err
	return err
}

func (b *body) isClosed() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.closed
}

// Seek moves no bytes; the next Read does.
func (b *body) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += b.pos
	case io.SeekEnd:
		off += b.size
	}
	if off < 0 {
		return 0, fmt.Errorf("seek blob %s to %d: before its start", b.digest, off)
	}
	if b.err == nil {
		if _, err := b.cur.Body.Seek(off, io.SeekStart); err != nil {
			return 0, err
		}
	}
	b.pos = off
	return off, nil
}

// Close ends a Read that waits.
func (b *body) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil
	}
	b.closed = true
	return b.cur.Close()
}
