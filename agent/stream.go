package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/blob"
)

// readAhead is how far before its position a reader makes the swarm fetch in order, in bytes. The rest comes rarest
// first.
const readAhead = 8 << 20

// stream reads a blob while it arrives. One stream belongs to one request.
type stream struct {
	ctx context.Context
	p   *pull
	id  int64
	pos int64
	end int64 // what lies between pos and it can be read without asking the body again
	// holdLast: this reader has read sequentially from 0, so its last byte is withheld until the digest is verified.
	holdLast bool
	wished   bool  // want was called
	wish     int64 // the position of its last call
}

var streamIDs atomic.Int64

func newStream(ctx context.Context, p *pull) *stream {
	_, verified := p.body.(heldBody)
	return &stream{ctx: ctx, p: p, id: streamIDs.Add(1), holdLast: !verified}
}

// Seek implements io.Seeker; it moves no bytes.
func (s *stream) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += s.pos
	case io.SeekEnd:
		off += s.p.size
	}
	if off < 0 {
		return 0, fmt.Errorf("seek to %d: before the start of the blob", off)
	}
	if off != s.pos {
		s.end = 0
	}
	s.pos = off
	return off, nil
}

// Read blocks until the next bytes are there. The last byte of a reader of the whole is held back until the whole blob
// has been verified, so that a wrong blob never ends clean.
func (s *stream) Read(b []byte) (int, error) {
	if s.pos >= s.p.size {
		return 0, io.EOF
	}
	if !s.wished && s.pos != 0 {
		s.holdLast = false
	}
	if !s.wished || s.pos-s.wish >= readAhead/4 || s.pos < s.wish {
		s.p.body.want(s.id, s.pos)
		s.wished, s.wish = true, s.pos
	}
	if s.end <= s.pos {
		end, err := s.p.body.wait(s.ctx, s.pos)
		if err != nil {
			return 0, err
		}
		s.end = end
	}
	n := min(int64(len(b)), s.end-s.pos)
	if s.holdLast && s.pos+n == s.p.size {
		if n > 1 {
			n--
		} else if err := s.verified(); err != nil {
			return 0, err
		}
	}
	k, err := s.p.body.ReadAt(b[:n], s.pos)
	s.pos += int64(k)
	if errors.Is(err, io.EOF) && k > 0 {
		err = nil
	}
	return k, err
}

func (s *stream) verified() error {
	select {
	case <-s.p.done:
		return s.p.err
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
}

func (s *stream) close() { s.p.body.unwant(s.id) }

// swarmBody reads pieces of a partial blob.
type swarmBody struct {
	part  *store.Partial
	fetch *swarm.Fetch
	m     *blob.Metainfo
}

func (b *swarmBody) ReadAt(p []byte, off int64) (int, error) { return b.part.ReadAt(p, off) }

func (b *swarmBody) wait(ctx context.Context, off int64) (int64, error) {
	i := int(off / b.m.PieceLength())
	if err := b.part.Wait(ctx, i); err != nil {
		return 0, err
	}
	for i++; i < b.m.NumPieces() && b.part.Has(i); i++ {
	}
	return min(int64(i)*b.m.PieceLength(), b.m.Size), nil
}

func (b *swarmBody) close() { b.part.Close() }

func (b *swarmBody) want(reader, off int64) { b.fetch.SetWindow(reader, off, readAhead) }

func (b *swarmBody) unwant(reader int64) { b.fetch.DropWindow(reader) }

// heldBody is a blob all of whose bytes were verified before it was published.
type heldBody struct{ *bytes.Reader }

func (b heldBody) wait(context.Context, int64) (end int64, err error) { return b.Size(), nil }
func (b heldBody) want(int64, int64)                                  {}
func (b heldBody) unwant(int64)                                       {}
func (b heldBody) close()                                             {}

// followed reads an upload session while it is written.
type followed struct {
	u    *store.Upload
	f    *os.File
	mu   sync.Mutex
	more chan struct{} // closed and replaced when bytes have come
	n    int64
	over bool
	err  error
}

func newFollowed(u *store.Upload) (*followed, error) {
	f, err := u.Reader()
	if err != nil {
		return nil, err
	}
	return &followed{u: u, f: f, more: make(chan struct{})}, nil
}

func (f *followed) ReadAt(p []byte, off int64) (int, error) { return f.f.ReadAt(p, off) }

func (f *followed) close() { f.f.Close() }

func (f *followed) want(int64, int64) {}

func (f *followed) unwant(int64) {}

func (f *followed) written() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.n
}

// advance says that n bytes in all were handed to the session. Bytes handed over are written before the next ones are
// asked for, so a reader may read what was handed over one step ago.
func (f *followed) advance(n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n = n
	close(f.more)
	f.more = make(chan struct{})
}

func (f *followed) end(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.over, f.err = true, err
	close(f.more)
	f.more = make(chan struct{})
}

func (f *followed) wait(ctx context.Context, off int64) (int64, error) {
	for {
		f.mu.Lock()
		end, over, err, more := f.u.Offset(), f.over, f.err, f.more
		if over {
			end = f.n
		}
		f.mu.Unlock()
		if err != nil {
			return 0, err
		}
		if end > off {
			return end, nil
		}
		if over {
			return 0, io.ErrUnexpectedEOF
		}
		select {
		case <-more:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// counted counts what is read from an origin and wakes the followers.
type counted struct {
	r io.Reader
	f *followed
	c prometheus.Counter
}

func (c *counted) Read(p []byte) (int, error) {
	c.f.advance(c.f.written()) // what the last Read gave has been written by now
	n, err := c.r.Read(p)
	c.c.Add(float64(n))
	c.f.mu.Lock()
	c.f.n += int64(n)
	c.f.mu.Unlock()
	return n, err
}
