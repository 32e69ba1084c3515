package sim

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"kraken/origin/bucket"
)

// memory is the bucket of a cluster. What it has answered for is there for ever; it may be slow, away, or answer with
// an error after it has written.
type memory struct {
	rnd *rand.Rand

	mu      sync.Mutex
	objects map[string][]byte
	right   map[string]*byte // objects that were found right, by their first byte
	mode    bucketMode
	changed chan struct{} // closed and replaced when mode changes
	flaky   float64       // share of calls that fail, half of the writes among them after they were done
	latency time.Duration
	puts    int
}

type bucketMode int

const (
	bucketUp   bucketMode = iota
	bucketDown            // every call fails at once
	bucketHung            // no call is answered until that changes
)

func newMemory(seed uint64) *memory {
	return &memory{rnd: rand.New(rand.NewPCG(seed, 3)), objects: map[string][]byte{}, right: map[string]*byte{}, changed: make(chan struct{}), latency: 2 * time.Millisecond}
}

func (m *memory) set(mode bucketMode) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mode = mode
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *memory) slow(latency time.Duration, flaky float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.latency, m.flaky = latency, flaky
}

// get is for checks.
func (m *memory) get(key string) ([]byte, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.objects[key]
	return b, ok
}

var errBucket = errors.New("simulated failure")

// handle is the bucket as one process sees it.
type handle struct {
	m *memory
	p *process
}

var _ bucket.Bucket = handle{}

// call lets a call take its time, and fails it where it has to. after says that it fails once its effect is there.
func (h handle) call(ctx context.Context) (after bool, err error) {
	fail := func() error { return fmt.Errorf("%w: %w", bucket.ErrUnavailable, errBucket) }
	for {
		h.m.mu.Lock()
		mode, changed := h.m.mode, h.m.changed
		d := h.m.latency/2 + time.Duration(h.m.rnd.Int64N(int64(h.m.latency)))
		unlucky, late := h.m.rnd.Float64() < h.m.flaky, h.m.rnd.IntN(2) == 0
		h.m.mu.Unlock()
		switch mode {
		case bucketHung:
			select {
			case <-changed:
				continue
			case <-h.p.dead:
				return false, errDead
			case <-ctx.Done():
				return false, fmt.Errorf("%w: %w", bucket.ErrUnavailable, context.Cause(ctx))
			}
		case bucketDown:
			if err := h.p.sleep(ctx, time.Millisecond); err != nil {
				return false, err
			}
			return false, fail()
		}
		if err := h.p.sleep(ctx, d); err != nil {
			return false, fmt.Errorf("%w: %w", bucket.ErrUnavailable, err)
		}
		if unlucky && !late {
			return false, fail()
		}
		return unlucky, nil
	}
}

func (h handle) notFound(key string) error { return fmt.Errorf("%s: %w", key, bucket.ErrNotFound) }

// Stat implements bucket.Bucket.
func (h handle) Stat(ctx context.Context, key string) (bucket.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if after, err := h.call(ctx); err != nil || after {
		return bucket.Object{}, cmpErr(err)
	}
	b, ok := h.m.get(key)
	if !ok {
		return bucket.Object{}, h.notFound(key)
	}
	return bucket.Object{Key: key, Size: int64(len(b))}, nil
}

func cmpErr(err error) error {
	if err == nil {
		err = fmt.Errorf("%w: %w", bucket.ErrUnavailable, errBucket)
	}
	return err
}

// Open implements bucket.Bucket.
func (h handle) Open(ctx context.Context, key string, off, length int64) (io.ReadCloser, error) {
	after, err := h.call(ctx)
	if err != nil {
		return nil, err
	}
	b, ok := h.m.get(key)
	if !ok {
		return nil, h.notFound(key)
	}
	b = b[min(off, int64(len(b))):]
	if length >= 0 {
		b = b[:min(length, int64(len(b)))]
	}
	r := &body{h: h, ctx: ctx, b: b}
	if after { // the answer breaks
		h.m.mu.Lock()
		defer h.m.mu.Unlock()
		r.breaks, r.b = true, b[:h.m.rnd.IntN(len(b)+1)]
	}
	return r, nil
}

// body is an object's bytes as they come.
type body struct {
	h      handle
	ctx    context.Context
	b      []byte
	breaks bool
}

func (r *body) Read(p []byte) (int, error) {
	if len(r.b) == 0 {
		if r.breaks {
			return 0, fmt.Errorf("%w: %w", bucket.ErrUnavailable, io.ErrUnexpectedEOF)
		}
		return 0, io.EOF
	}
	if err := r.h.p.sleep(r.ctx, 100*time.Microsecond); err != nil {
		return 0, err
	}
	n := copy(p[:min(len(p), 32<<10)], r.b)
	r.b = r.b[n:]
	return n, nil
}

func (r *body) Close() error { return nil }

// Put implements bucket.Bucket.
func (h handle) Put(ctx context.Context, key string, r io.Reader) error {
	b, err := io.ReadAll(r)
	if err != nil {
		return fmt.Errorf("%w: %w", bucket.ErrUnavailable, err)
	}
	after, err := h.call(ctx)
	if errors.Is(err, errDead) || ctx.Err() != nil { // it may have arrived
		h.m.mu.Lock()
		defer h.m.mu.Unlock()
		if h.m.mode == bucketUp && h.m.rnd.IntN(2) == 0 {
			h.m.objects[key] = b
		}
		return cmpErr(err) // nobody is told that it has, who stopped waiting at the moment when it had
	}
	if err != nil {
		return err
	}
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	h.m.puts++
	h.m.objects[key] = b
	if after {
		return cmpErr(nil)
	}
	return nil
}

// Delete implements bucket.Bucket.
func (h handle) Delete(ctx context.Context, key string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	after, err := h.call(ctx)
	if err != nil {
		return err
	}
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	delete(h.m.objects, key)
	if after {
		return cmpErr(nil)
	}
	return nil
}

// List implements bucket.Bucket. It goes page by page, and sees of what changes meanwhile what comes later.
func (h handle) List(ctx context.Context, prefix, last string, fn func(bucket.Object) error) error {
	for {
		after, err := h.call(ctx)
		if err != nil || after {
			return cmpErr(err)
		}
		h.m.mu.Lock()
		var keys []string
		for _, k := range slices.Sorted(maps.Keys(h.m.objects)) {
			if strings.HasPrefix(k, prefix) && k > last {
				if keys = append(keys, k); len(keys) == 100 {
					break
				}
			}
		}
		sizes := make([]int, len(keys))
		for i, k := range keys {
			sizes[i] = len(h.m.objects[k])
		}
		h.m.mu.Unlock()
		for i, k := range keys {
			last = k
			if err := fn(bucket.Object{Key: k, Size: int64(sizes[i])}); err != nil {
				return err
			}
		}
		if len(keys) < 100 {
			return nil
		}
	}
}

// wrong lists the blobs whose bytes in the bucket are not those of their digest.
func (m *memory) wrong() (keys []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, b := range m.objects {
		if !strings.Contains(k, "/blobs/sha256/") || !strings.HasSuffix(k, "/data") {
			continue
		}
		if len(b) > 0 && m.right[k] == &b[0] {
			continue
		}
		parts := strings.Split(k, "/")
		if fmt.Sprintf("%x", sha256.Sum256(b)) != parts[len(parts)-2] {
			keys = append(keys, k)
		} else if len(b) > 0 {
			m.right[k] = &b[0]
		}
	}
	slices.Sort(keys)
	return keys
}
