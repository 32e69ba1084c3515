package buildindex

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/upstream"
	"kraken/proto/registry"
)

// Bounds of the blobs that are read for a proof.
const (
	// maxReads bounds those that are read or wait for it, maxReading those that are read at once, and readingEach those
	// of one registry.
	maxReads, maxReading, readingEach = 64, 4, 2
	// readLimit is how long one takes.
	readLimit = 10 * time.Minute
)

// readers are the slots for blobs that are read for a proof. Whoever names a registry says how slowly it sends, so one
// holds up neither others' proofs nor other questions.
type readers struct {
	budget *upstream.Budget
	all    chan struct{}

	mu    sync.Mutex
	hosts map[string]*hostReaders
}

type hostReaders struct {
	slots chan struct{}
	users int
}

func newReaders() *readers {
	return &readers{budget: upstream.NewBudget("blobs are read for a proof", maxReads), all: make(chan struct{}, maxReading), hosts: map[string]*hostReaders{}}
}

// take waits for a slot for as long as who asked waits for the proof: ErrUnavailable when there is none then, and at
// once where too many wait.
func (r *readers) take(ctx context.Context, up *upstream.Registry) (release func(), err error) {
	leave, err := r.budget.Take(up)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	h := r.hosts[up.Host]
	if h == nil {
		h = &hostReaders{slots: make(chan struct{}, readingEach)}
		r.hosts[up.Host] = h
	}
	h.users++
	r.mu.Unlock()
	undo := []func(){leave, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if h.users--; h.users == 0 {
			delete(r.hosts, up.Host)
		}
	}}
	release = func() {
		for _, f := range undo {
			f()
		}
	}
	ctx, cancel := context.WithTimeout(ctx, proofPatience)
	defer cancel()
	for _, slots := range []chan struct{}{h.slots, r.all} {
		select {
		case slots <- struct{}{}:
			undo = append(undo, func() { <-slots })
		case <-ctx.Done():
			release()
			return nil, fmt.Errorf("%w: other blobs are read for their proofs: %w", registry.ErrUnavailable, context.Cause(ctx))
		}
	}
	return release, nil
}

// read reads a blob of an upstream's repository that is said to have size bytes, negative where nobody said, keeps
// nothing of it, and returns its size: that the upstream can send it is a proof whoever the upstream is.
func (mi *mirror) read(ctx context.Context, q question, d digest.Digest, size int64) (int64, error) {
	release, err := mi.reading.take(ctx, q.up)
	if err != nil {
		return 0, err
	}
	defer release()
	body, sent, err := q.up.OpenBlob(ctx, q.remote, d, 0, -1)
	if err != nil {
		return 0, err
	}
	if size < 0 {
		size = sent
	}
	if size < 0 {
		return 0, errors.Join(fmt.Errorf("%w: %s does not say how large %s is", registry.ErrUnavailable, q.up.Host, d), body.Close())
	}
	v := d.Verifier()
	n, err := io.Copy(v, io.LimitReader(body, size))
	if err = errors.Join(err, body.Close()); err != nil {
		return n, fmt.Errorf("%w: read %s of %s at %s: %w", registry.ErrUnavailable, d, q.remote, q.up.Host, err)
	}
	if !v.Verified() {
		return n, fmt.Errorf("%w: %s says that it has %s in %s, and sends something else", registry.ErrBlobUnknown, q.up.Host, d, q.remote)
	}
	return n, nil
}
