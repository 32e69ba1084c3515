package swarm

import (
	"context"
	"crypto/sha1"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"sync"
	"sync/atomic"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/anacrolix/torrent/storage"

	"kraken/origin/store"
	"kraken/origin/swarm/plan"
	"kraken/origin/swarm/rate"
	"kraken/proto/blob"
)

// content is the library's storage of one torrent: a whole blob of the store, or a partial one that is fetched.
type content struct {
	m       *blob.Metainfo
	fetch   *Fetch        // nil: only seeded
	limiter *rate.Limiter // set when the library is given the torrent
	gone    chan struct{} // closed by close
	// some connection can't send from the file (TLS, obfuscation): the library reads the blocks of all
	copied atomic.Bool

	mu     sync.RWMutex // held for reading while a file is in use
	part   *store.Partial
	file   *store.Reader
	closed bool
}

// board returns what the fetch of the content knows of its pieces; nil when it is only seeded.
func (c *content) board() *plan.Board {
	if c.fetch == nil {
		return nil
	}
	return c.fetch.board
}

// OpenTorrent implements storage.ClientImpl. It is called with the library's lock and can't fail: then the library
// would go on with a torrent that has no pieces.
func (c *content) OpenTorrent(context.Context, *metainfo.Info, metainfo.Hash) (storage.TorrentImpl, error) {
	return storage.TorrentImpl{
		Piece: func(p metainfo.Piece) storage.PieceImpl { return pieceContent{c, p.Index()} },
		Close: c.close,
	}, nil
}

// close waits for reads in progress.
func (c *content) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed && c.gone != nil {
		close(c.gone)
	}
	c.closed, c.part = true, nil
	if r := c.file; r != nil {
		c.file = nil
		return r.Close()
	}
	return nil
}

// commit makes reads follow the committed blob. The partial blob is not used any more when it returns.
func (c *content) commit(r *store.Reader) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		r.Close()
		return
	}
	c.part, c.file = nil, r
}

func (c *content) readAt(b []byte, off int64) (int, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	switch {
	case c.file != nil:
		return c.file.File().ReadAt(b, off)
	case c.part != nil:
		return c.part.ReadAt(b, off)
	default:
		// The torrent was dropped and its connections are closed, so these bytes reach nobody. An error would make the
		// library panic: it does not expect one between the two.
		clear(b)
		return len(b), nil
	}
}

// data returns the file that has the blob, or what is there of it; nil when the content is closed.
func (c *content) data() *os.File {
	c.mu.RLock()
	defer c.mu.RUnlock()
	switch {
	case c.file != nil:
		return c.file.File()
	case c.part != nil:
		return c.part.File()
	default:
		return nil
	}
}

// pieceContent is one piece. The library makes one for every call.
type pieceContent struct {
	c *content
	i int
}

func (p pieceContent) offset() int64 { return int64(p.i) * p.c.m.PieceLength() }

// ReadAt returns a block for a peer: nothing else here makes the library read. So this is where the uploads of a
// blob are limited. The library has a goroutine for each connection that reads its peer's blocks one after the other;
// messages don't wait for it.
func (p pieceContent) ReadAt(b []byte, off int64) (int, error) {
	if p.c.limiter != nil {
		p.c.limiter.WaitBlobUp(p.c.gone, p.c.m.Digest, len(b))
	}
	if !p.c.copied.Load() {
		return len(b), nil // conn.Write sends the block from the file
	}
	return p.c.readAt(b, p.offset()+off)
}

// Completion is known for every piece from the start, so the library checks none by itself.
func (p pieceContent) Completion() storage.Completion {
	p.c.mu.RLock()
	defer p.c.mu.RUnlock()
	return storage.Completion{Ok: true, Complete: p.c.file != nil || p.c.part != nil && p.c.part.Has(p.i)}
}

var blockSeed = maphash.MakeSeed()

// WriteAt takes a block from a peer. A block of a piece that has come from elsewhere meanwhile, or is coming, is
// dropped.
func (p pieceContent) WriteAt(b []byte, off int64) (int, error) {
	p.c.mu.RLock()
	defer p.c.mu.RUnlock()
	if p.c.part == nil {
		return 0, errors.New("write to a blob that is complete")
	}
	board := p.c.fetch.board
	if !board.BeginWrite(p.i) {
		return len(b), nil
	}
	var err error
	if int64(len(b)) == p.c.m.PieceSize(p.i) {
		// The piece is this one block: it is hashed from memory, and a wrong one is not written at all.
		want, unknown := p.c.fetch.pieceHash(p.i)
		ok := unknown == nil && sha1.Sum(b) == want
		if ok {
			_, err = p.c.part.WriteAt(b, p.offset())
		}
		liar := board.WroteWhole(p.i, ok)
		if !ok && unknown == nil { // else nobody is to blame, and the piece is fetched again
			p.c.fetch.wrongPiece(p.i, known(liar), nil)
		}
	} else {
		_, err = p.c.part.WriteAt(b, p.offset()+off)
		board.Wrote(p.i, off, maphash.Bytes(blockSeed, b))
	}
	board.EndWrite(p.i)
	if err != nil {
		err = fmt.Errorf("write piece %d of %s: %w", p.i, p.c.m.Digest, err)
		p.c.fetch.finish(err) // the library would ask no peer for anything any more, and the fetch never end
		return 0, err
	}
	return len(b), nil
}

// known lists a peer that may be nil.
func known(p *plan.Peer) []*plan.Peer {
	if p == nil {
		return nil
	}
	return []*plan.Peer{p}
}

// errNotPassed tells the library that a piece has to be fetched again. Being an error, and not a wrong hash, it keeps
// the library from banning an IP address; this package bans peers.
var errNotPassed = errors.New("piece did not pass, or is coming from elsewhere")

// SelfHash implements storage.SelfHashing.
func (p pieceContent) SelfHash() (metainfo.Hash, error) {
	p.c.mu.RLock()
	defer p.c.mu.RUnlock()
	if p.c.part == nil || p.c.fetch == nil {
		return metainfo.Hash{}, errNotPassed
	}
	check := p.c.fetch.board.BeginCheck(p.i)
	if check == plan.CheckNo {
		return metainfo.Hash{}, errNotPassed
	}
	passed := metainfo.Hash(p.c.m.PieceHash(p.i)) // as the library knows it, be it a placeholder
	if check == plan.CheckDone {
		return passed, nil
	}
	want, err := p.c.fetch.pieceHash(p.i)
	var got [sha1.Size]byte
	if err == nil {
		got, err = hashPiece(p.c.part, p.c.m, p.i)
	}
	if err != nil {
		p.c.fetch.board.Unreadable(p.i)
		return metainfo.Hash{}, err
	}
	if got != want {
		liars, doubtful := p.c.fetch.board.Failed(p.i)
		p.c.fetch.wrongPiece(p.i, liars, doubtful)
		return metainfo.Hash{}, errNotPassed
	}
	return passed, nil
}

var hashBuffers = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

func hashPiece(part *store.Partial, m *blob.Metainfo, i int) (sum [sha1.Size]byte, err error) {
	buf := hashBuffers.Get().(*[]byte)
	defer hashBuffers.Put(buf)
	h := sha1.New()
	off := int64(i) * m.PieceLength()
	for left := m.PieceSize(i); left > 0; {
		n, err := part.ReadAt((*buf)[:min(left, int64(len(*buf)))], off)
		h.Write((*buf)[:n])
		off, left = off+int64(n), left-int64(n)
		if err != nil && left > 0 {
			return sum, fmt.Errorf("hash piece %d of %s: %w", i, m.Digest, err)
		}
	}
	h.Sum(sum[:0])
	return sum, nil
}

// MarkComplete follows a SelfHash that passed.
func (p pieceContent) MarkComplete() error {
	p.c.mu.RLock()
	defer p.c.mu.RUnlock()
	if p.c.part == nil {
		return nil
	}
	if err := p.c.part.MarkVerified(p.i); err != nil {
		return err
	}
	p.c.fetch.verified(p.i, fromPeer)
	return nil
}

// MarkNotComplete follows a SelfHash that did not pass; what is known about the piece was written down there.
func (p pieceContent) MarkNotComplete() error { return nil }
