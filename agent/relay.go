package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/jellydator/ttlcache/v3"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/origin/store"
	"kraken/proto/blob"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// relay reads one blob from its origins for one reader and keeps nothing: the way of an agent whose disk, or cache, has
// no room. A reader of the whole gets the last byte once all were verified; one of a part gets what comes. One
// goroutine uses it. Close must be called.
type relay struct {
	a      *Agent
	ctx    context.Context
	repo   string
	digest digest.Digest
	size   int64 // -1 before the first answer
	pos    int64 // of the next byte to read

	src    *httpSource // nil before the first read, and after a jump
	from   io.Reader   // src, counted and at the configured rate
	hash   hash.Hash   // of the first hashed bytes
	hashed int64
}

// rememberWrong is for how long the origins that sent other bytes to a relay are asked last for the blob.
const rememberWrong = time.Minute

// relayed returns a blob that the cache has no room for. Of up to heldWhole bytes all are verified first, and asked for
// twice where they were others.
func (a *Agent) relayed(ctx context.Context, repo string, d digest.Digest, rng registry.Range) (*registry.Content, error) {
	a.m.relayed.Inc()
	r := &relay{a: a, ctx: ctx, repo: repo, digest: d, size: -1, hash: d.Algorithm().Hash()}
	if rng.Offset > 0 {
		desc, err := transport.AskAgain(ctx, a.originPatience(repo), isAway, func() (v1.Descriptor, error) { return a.origins.StatBlob(ctx, repo, d) })
		if err != nil {
			return nil, err
		}
		r.size = desc.Size
	} else if err := r.open(); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	if r.size > heldWhole {
		return &registry.Content{Digest: d, Size: r.size, Body: r, Close: r.Close}, nil
	}
	b, err := r.whole()
	if errors.Is(err, store.ErrDigestMismatch) && len(a.wrongOrigins(d)) > 0 {
		b, err = r.whole()
	}
	if err != nil {
		return nil, err
	}
	return &registry.Content{Digest: d, Size: r.size, Body: bytes.NewReader(b), Close: func() error { return nil }}, nil
}

// whole reads and verifies the blob, and closes r.
func (r *relay) whole() ([]byte, error) {
	r.pos = 0
	b := make([]byte, r.size)
	_, err := io.ReadFull(r, b)
	if err == nil && r.size == 0 {
		err = r.verify()
	}
	return b, errors.Join(err, r.Close())
}

// open asks the origins for the bytes from pos on, and learns the size from the first answer. It waits for origins that
// restart, or for the bucket, as a pull does.
func (r *relay) open() error {
	if r.pos == 0 {
		r.hash.Reset()
		r.hashed = 0
	}
	src, err := transport.AskAgain(r.ctx, r.a.originPatience(r.repo), isAway, func() (*httpSource, error) {
		src := r.a.newHTTPSource(r.ctx, r.repo, r.digest, r.a.wrongOrigins(r.digest))
		src.pos = r.pos
		return src, src.open()
	})
	r.src, r.from = src, &counted{r.a.swarm.LimitDownload(r.ctx, r.digest, src), r.a.m.fromHTTP}
	if err != nil {
		return fmt.Errorf("relay %s: %w", r.digest, err)
	}
	if r.size >= 0 && r.size != r.src.size {
		return fmt.Errorf("relay %s: %w: it has %d bytes, and had %d", r.digest, registry.ErrUnavailable, r.src.size, r.size)
	}
	r.size = r.src.size
	return nil
}

// Seek implements io.Seeker; it moves no bytes.
func (r *relay) Seek(off int64, whence int) (int64, error) {
	off, err := blob.Seek(off, whence, r.pos, r.size)
	if err == nil {
		r.pos = off
	}
	return off, err
}

// Read implements io.Reader.
func (r *relay) Read(b []byte) (int, error) {
	if r.pos >= r.size {
		return 0, io.EOF
	}
	if len(b) == 0 {
		return 0, nil
	}
	if r.src != nil && r.src.pos != r.pos {
		r.src.Close()
		r.src = nil
	}
	if r.src == nil {
		if err := r.open(); err != nil {
			return 0, err
		}
	}
	whole := r.hashed == r.pos
	n := min(int64(len(b)), r.size-r.pos)
	if whole && n > 1 && r.pos+n == r.size {
		n-- // the last byte by itself
	}
	k, err := r.from.Read(b[:n])
	if whole {
		r.hash.Write(b[:k])
		r.hashed += int64(k)
	}
	r.pos += int64(k)
	switch {
	case r.hashed == r.size && k > 0 && whole:
		if err := r.verify(); err != nil {
			return 0, err
		}
		return k, nil
	case errors.Is(err, io.EOF) && k == 0:
		return 0, io.ErrUnexpectedEOF
	case k > 0:
		return k, nil // an error comes again
	}
	return k, err
}

// verify compares the digest of all bytes. Who sent others is asked last for a while.
func (r *relay) verify() error {
	if digest.NewDigest(r.digest.Algorithm(), r.hash) == r.digest {
		return nil
	}
	err := fmt.Errorf("%w: relay %s: %w", registry.ErrUnavailable, r.digest, store.ErrDigestMismatch)
	if r.src != nil {
		wrong := r.src.suspects(err)
		r.a.wrong.Set(r.digest, wrong, ttlcache.DefaultTTL)
		r.a.tell(r.repo, r.digest, wrong...)
	}
	r.a.log.Warn("origins sent other bytes for a blob that was relayed", "digest", r.digest, "origins", r.a.wrongOrigins(r.digest))
	return err
}

// Close ends the request under way.
func (r *relay) Close() error {
	if r.src == nil {
		return nil
	}
	src := r.src
	r.src = nil
	return src.Close()
}

// wrongOrigins returns the ids of the origins that lately sent other bytes to a relay of d, none where there is nobody
// else to ask.
func (a *Agent) wrongOrigins(d digest.Digest) []string {
	var ids []string
	if lately := a.wrong.Get(d); lately != nil {
		ids = lately.Value()
	}
	if len(a.originsBut(d, ids)) == 0 {
		return nil
	}
	return ids
}

// noteRoom says in the log when the cache has no room any more, and when it has again.
func (a *Agent) noteRoom(full error) {
	switch {
	case full != nil && !a.full.Swap(true):
		a.log.Warn("the cache has no room: blobs are relayed from the origins and not kept until it has", "error", full)
	case full == nil && a.full.Swap(false):
		a.log.Info("the cache has room again")
	}
}
