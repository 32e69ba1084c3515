package agent

import (
	"bytes"
	"context"
	"io"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/blob"
)

// readAhead is how far before its position a reader makes the swarm fetch in order, in bytes. The rest comes rarest
// first.
const readAhead = 8 << 20

// stream reads a blob while it arrives, and makes what it will read next come first. One stream belongs to one request.
type stream struct {
	*store.Follower
	in    *incoming
	id    int64
	begun bool  // the body was asked for bytes
	asked int64 // from which position on, the last time
}

var streamIDs atomic.Int64

func newStream(ctx context.Context, in *incoming) *stream {
	hold := store.HoldFromWhole
	if _, verified := in.body.(heldBody); verified {
		hold = store.HoldFromNone
	}
	s := &stream{Follower: store.Follow(ctx, in, in.size, hold), in: in, id: streamIDs.Add(1)}
	s.OnRead = s.ask
	return s
}

// ask asks the body for the bytes from pos on, unless it was a moment ago.
func (s *stream) ask(pos int64) {
	if !s.begun || pos-s.asked >= readAhead/4 || pos < s.asked {
		s.in.body.want(s.id, pos)
		s.begun, s.asked = true, pos
	}
}

func (s *stream) close() { s.in.body.unwant(s.id) }

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

// followed is an upload session that is read while it is written.
type followed struct{ *store.Growth }

func (f followed) wait(ctx context.Context, off int64) (int64, error) { return f.Wait(ctx, off) }
func (f followed) want(int64, int64)                                  {}
func (f followed) unwant(int64)                                       {}
func (f followed) close()                                             { f.Close() }

// counted counts what is read from an origin.
type counted struct {
	r io.Reader
	c prometheus.Counter
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.c.Add(float64(n))
	return n, err
}
