package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/blob"
	"kraken/proto/cluster"
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

	next   int64 // position after the last read
	jumped bool  // it did not read all from byte 0 on
	relay  *relay
	others func() *relay // makes one
	joined bool          // another caller began the pull: what he is refused is no fault of this reader
}

var streamIDs atomic.Int64

// newStream returns a reader of in, which goes on by what others returns where the disk fills up meanwhile, or what
// another caller began fails.
func newStream(ctx context.Context, in *incoming, others func() *relay) *stream {
	hold := store.HoldFromWhole
	if _, verified := in.body.(heldBody); verified {
		hold = store.HoldFromNone
	}
	s := &stream{Follower: store.Follow(ctx, in, in.size, hold), in: in, id: streamIDs.Add(1), others: others}
	s.joined = in.p.caller != cluster.Authorization(ctx)
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

// Read implements io.Reader.
func (s *stream) Read(b []byte) (int, error) {
	if s.relay != nil {
		return s.relay.Read(b)
	}
	pos, err := s.Follower.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0, err
	}
	s.jumped = s.jumped || pos != s.next
	n, err := s.Follower.Read(b)
	s.next = pos + int64(n)
	if n > 0 || !s.goesOn(err) {
		return n, err
	}
	if rerr := s.goOn(pos); rerr != nil {
		return 0, errors.Join(err, rerr)
	}
	return s.relay.Read(b)
}

// isUncached reports whether an error says only that the cache does not get a blob: the disk is full, here or at the
// origins, or somebody else still uses its file. Its readers get it from the origins.
func isUncached(err error) bool {
	return errors.Is(err, store.ErrFull) || errors.Is(err, errPassed) || errors.Is(err, store.ErrBusy)
}

// goesOn reports whether the rest can be had in another way after an error: where the cache does not get the blob, and
// where the pull that failed was read with what another caller had shown. Wrong bytes have been read then, and stay
// wrong.
func (s *stream) goesOn(err error) bool {
	if isUncached(err) {
		return true
	}
	return s.joined && err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, store.ErrDigestMismatch)
}

// goOn makes the stream read from the origins from pos on, without the disk and without the pull. What a reader of the
// whole has had is hashed again from the disk, so that its last byte waits for the digest as before.
func (s *stream) goOn(pos int64) error {
	r := s.others()
	r.size, r.pos = s.in.size, pos
	if !s.jumped && pos > 0 {
		n, err := io.Copy(r.hash, io.NewSectionReader(s.in, 0, pos))
		if err != nil {
			return fmt.Errorf("read again what was relayed of %s: %w", r.digest, err)
		}
		r.hashed = n
	}
	s.relay = r
	return nil
}

// Seek implements io.Seeker; it moves no bytes.
func (s *stream) Seek(off int64, whence int) (int64, error) {
	if s.relay != nil {
		return s.relay.Seek(off, whence)
	}
	return s.Follower.Seek(off, whence)
}

func (s *stream) close() {
	s.in.body.unwant(s.id)
	if s.relay != nil {
		s.relay.Close()
	}
}

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
