package store

import (
	"context"
	"crypto/sha1"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"kraken/proto/blob"
)

// Growing is a blob that is read while it arrives.
type Growing interface {
	io.ReaderAt
	// Wait blocks until the byte at off may be read, and returns the end of what may be read from off on.
	Wait(ctx context.Context, off int64) (end int64, err error)
	// Verified blocks until the whole blob was checked against its digest, and returns what came of it.
	Verified(ctx context.Context) error
}

// LastByte says which readers of a growing blob get its last byte only after the whole was verified, so that a wrong
// blob never ends clean.
type LastByte int

const (
	// HoldFromAll holds it back from every reader.
	HoldFromAll LastByte = iota
	// HoldFromWhole holds it back from one that has begun at byte 0. One that asks for a part gets what has come.
	HoldFromWhole
	// HoldFromNone is for blobs that were verified before anybody may read them.
	HoldFromNone
)

// Follower reads a growing blob from any position; Read waits for bytes that have not come yet. It belongs to one
// request and is used by one goroutine.
type Follower struct {
	ctx   context.Context
	g     Growing
	size  int64
	hold  LastByte
	begun bool
	pos   int64
	end   int64 // up to which it may read from pos on without waiting
	// OnRead, where it is set, is told the position before each Read.
	OnRead func(pos int64)
}

// Follow returns a reader of g, a blob of size bytes, that begins at byte 0 and stops waiting when ctx is done.
func Follow(ctx context.Context, g Growing, size int64, hold LastByte) *Follower {
	return &Follower{ctx: ctx, g: g, size: size, hold: hold}
}

// Seek implements io.Seeker; it moves no bytes.
func (f *Follower) Seek(off int64, whence int) (int64, error) {
	off, err := blob.Seek(off, whence, f.pos, f.size)
	if err != nil {
		return 0, err
	}
	if off != f.pos {
		f.end = 0
	}
	f.pos = off
	return off, nil
}

// Read implements io.Reader. It blocks until at least one byte has come.
func (f *Follower) Read(b []byte) (int, error) {
	if f.pos >= f.size {
		return 0, io.EOF
	}
	if len(b) == 0 {
		return 0, nil
	}
	if f.hold == HoldFromWhole && !f.begun && f.pos != 0 {
		f.hold = HoldFromNone
	}
	f.begun = true
	if f.OnRead != nil {
		f.OnRead(f.pos)
	}
	if f.end <= f.pos {
		end, err := f.g.Wait(f.ctx, f.pos)
		if err != nil {
			return 0, err
		}
		f.end = end
	}
	n := min(int64(len(b)), f.end-f.pos)
	if f.hold != HoldFromNone && f.pos+n == f.size {
		if n > 1 {
			n--
		} else if err := f.g.Verified(f.ctx); err != nil {
			return 0, err
		}
	}
	k, err := f.g.ReadAt(b[:n], f.pos)
	f.pos += int64(k)
	if errors.Is(err, io.EOF) && k > 0 {
		err = nil
	}
	return k, err
}

// Growth is an upload session as those see it who read it while it is written. Whoever writes the session calls End
// when it has become a blob or has failed; Close comes after the last reader.
type Growth struct {
	u *Upload
	f *os.File

	more       Signal // bytes have come
	pieces     atomic.Pointer[[]byte]
	morePieces Signal
	ended      chan struct{}
	size       int64 // of the session at its end
	err        error // why it failed; read after ended
}

// Growth opens the session for readers. There is one for each session, opened before its first byte is written.
func (u *Upload) Growth() (*Growth, error) {
	f, err := u.Reader()
	if err != nil {
		return nil, err
	}
	g := &Growth{u: u, f: f, ended: make(chan struct{})}
	if !u.growth.CompareAndSwap(nil, g) {
		return nil, errors.Join(fmt.Errorf("follow upload %s: %w", u.id, ErrBusy), f.Close())
	}
	return g, nil
}

// wake tells the readers that bytes were written. pieces are the hashes of all whole pieces so far, nil where none are
// made.
func (g *Growth) wake(pieces []byte) {
	if old := g.pieces.Load(); pieces != nil && (old == nil || len(pieces) > len(*old)) {
		g.pieces.Store(&pieces)
		g.morePieces.Wake()
	}
	g.more.Wake()
}

// Pieces returns the concatenated SHA-1 hashes of the pieces that have come whole so far, from piece number from on,
// and a channel that is closed when another piece has. It is empty, and stays so, where the session makes no metainfo.
func (g *Growth) Pieces(from int) (hashes []byte, more <-chan struct{}) {
	more = g.morePieces.C()
	if p := g.pieces.Load(); p != nil && from < len(*p)/sha1.Size {
		hashes = (*p)[from*sha1.Size:]
	}
	return hashes, more
}

// Ended returns a channel that is closed when no byte comes any more.
func (g *Growth) Ended() <-chan struct{} { return g.ended }

// End says that no byte comes any more: with nil that the session was verified and committed, else why not.
func (g *Growth) End(err error) {
	g.size, g.err = g.u.Offset(), err
	close(g.ended)
}

// Close closes the file. The blob that the session became is not harmed.
func (g *Growth) Close() error { return g.f.Close() }

// Received returns how many bytes have come.
func (g *Growth) Received() int64 { return g.u.Offset() }

// ReadAt implements io.ReaderAt; bytes before the end that Wait returned may be read.
func (g *Growth) ReadAt(p []byte, off int64) (int, error) { return g.f.ReadAt(p, off) }

// Wait implements Growing. The bytes are received, and not verified yet.
func (g *Growth) Wait(ctx context.Context, off int64) (int64, error) {
	for {
		more := g.more.C()
		select {
		case <-g.ended:
			switch {
			case g.err != nil:
				return 0, g.err
			case g.size <= off:
				return 0, io.ErrUnexpectedEOF
			}
			return g.size, nil
		default:
		}
		if end := g.u.Offset(); end > off {
			return end, nil
		}
		select {
		case <-more:
		case <-g.ended:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// Verified implements Growing.
func (g *Growth) Verified(ctx context.Context) error {
	select {
	case <-g.ended:
		return g.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
