package swarm

import (
	"context"
	"errors"
	"io"
	"sync"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/anacrolix/torrent/storage"

	"kraken/origin/store"
	"kraken/proto/blob"
)

// pieces is the library's view of one blob: positioned reads and writes of one flat file, and the store's word for what is
// verified. It begins as a partial blob or a whole one; a partial one becomes whole.
type pieces struct {
	m *blob.Metainfo

	mu    sync.RWMutex
	part  *store.Partial
	whole *store.Reader
	fetch *Fetch
}

// OpenTorrent implements storage.ClientImpl.
func (p *pieces) OpenTorrent(context.Context, *metainfo.Info, metainfo.Hash) (storage.TorrentImpl, error) {
	return storage.TorrentImpl{
		Piece: func(mp metainfo.Piece) storage.PieceImpl { return &piece{p, mp.Index()} },
		Close: func() error { return nil },
	}, nil
}

var errClosed = errors.New("blob is closed")

func (p *pieces) reader() (io.ReaderAt, error) {
	switch {
	case p.whole != nil:
		return p.whole.File(), nil
	case p.part != nil:
		return p.part, nil
	}
	return nil, errClosed
}

// become swaps the partial blob for the whole one.
func (p *pieces) become(r *store.Reader) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.whole, p.part, p.fetch = r, nil, nil
}

func (p *pieces) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.whole != nil {
		p.whole.Close()
	}
	p.whole, p.part, p.fetch = nil, nil, nil
}

type piece struct {
	p *pieces
	i int
}

func (q *piece) base() int64 { return int64(q.i) * q.p.m.PieceLength() }

func (q *piece) ReadAt(b []byte, off int64) (int, error) {
	q.p.mu.RLock()
	defer q.p.mu.RUnlock()
	r, err := q.p.reader()
	if err != nil {
		return 0, err
	}
	if left := q.p.m.PieceSize(q.i) - off; int64(len(b)) > left {
		if left <= 0 {
			return 0, io.EOF
		}
		n, err := r.ReadAt(b[:left], q.base()+off)
		if err == nil {
			err = io.EOF
		}
		return n, err
	}
	return r.ReadAt(b, q.base()+off)
}

// WriteAt drops bytes of a piece that is verified already: a late block of a lying peer must not spoil it. An error would make
// the library stop downloading.
func (q *piece) WriteAt(b []byte, off int64) (int, error) {
	q.p.mu.RLock()
	defer q.p.mu.RUnlock()
	if q.p.part == nil {
		return 0, errClosed
	}
	if q.p.part.Has(q.i) {
		return len(b), nil
	}
	return q.p.part.WriteAt(b, q.base()+off)
}

func (q *piece) MarkComplete() error {
	q.p.mu.RLock()
	part, fetch := q.p.part, q.p.fetch
	q.p.mu.RUnlock()
	if part == nil {
		return nil
	}
	if err := part.MarkVerified(q.i); err != nil {
		return err
	}
	if fetch != nil {
		fetch.verified(q.i, true)
	}
	return nil
}

func (q *piece) MarkNotComplete() error {
	q.p.mu.RLock()
	part, fetch := q.p.part, q.p.fetch
	q.p.mu.RUnlock()
	if part == nil {
		return nil
	}
	if fetch != nil {
		fetch.failed(q.i)
	}
	return part.MarkUnverified(q.i)
}

// Completion is always known: with an unknown one the library would never download the piece.
func (q *piece) Completion() storage.Completion {
	q.p.mu.RLock()
	defer q.p.mu.RUnlock()
	complete := q.p.whole != nil || (q.p.part != nil && q.p.part.Has(q.i))
	return storage.Completion{Ok: true, Complete: complete}
}

// refuse is the storage of torrents that nobody has opened here; there are none.
type refuse struct{}

func (refuse) OpenTorrent(context.Context, *metainfo.Info, metainfo.Hash) (storage.TorrentImpl, error) {
	return storage.TorrentImpl{}, errClosed
}
