package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"os"
	"path"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
)

// Partial is a blob of which only some pieces are there. It is one object for all its users; each calls Close once.
//
// Its file `pieces` holds two bitmaps: the pieces that were synced to the disk, and the ones that were verified,
// written for each piece without a sync, together with the boot id of the machine. After a crash of the process alone
// the second one is true; after a crash of the machine only the first.
type Partial struct {
	s *Store
	m *blob.Metainfo
	f *os.File // the data
	b *os.File // the bitmaps

	refs int // under the store's lock

	ending sync.Mutex // held while the last use is closed, and while the blob is committed
	closed bool

	mu      sync.Mutex
	have    blob.Bitmap
	synced  int    // pieces that the synced bitmap has
	changed Signal // a piece was verified, or err was set
	err     error
	over    bool // committed or failed: the bitmaps are not written any more

	kick   chan struct{}
	stop   chan struct{}
	done   chan struct{}
	hash   hash.Hash // of the first hashed pieces; used by the worker, and by Commit after it
	hashed int
}

const (
	piecesMagic   = "kraken-pieces 1\n"
	flushInterval = 5 * time.Second
)

// bootID tells one run of the machine from another (random(4)).
var bootID = sync.OnceValue(func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || len(b) < 36 {
		return ""
	}
	return string(b[:36])
})

func piecesHeader(boot string) string { return fmt.Sprintf("%s%-36s\n", piecesMagic, boot) }

// encodePieces is the content of the pieces file.
func encodePieces(boot string, synced, have blob.Bitmap) []byte {
	return append(append([]byte(piecesHeader(boot)), synced.Bytes()...), have.Bytes()...)
}

// decodePieces returns the pieces that were synced, and those that can be trusted in this run of the machine. What
// can't be read means none.
func decodePieces(boot string, n int, b []byte) (synced, have blob.Bitmap) {
	h := piecesHeader(boot)
	k := (n + 7) / 8
	none := blob.NewBitmap(n)
	if len(b) != len(h)+2*k || !bytes.HasPrefix(b, []byte(piecesMagic)) {
		return none, blob.NewBitmap(n)
	}
	synced, err := blob.ParseBitmap(n, b[len(h):len(h)+k])
	if err != nil {
		return none, blob.NewBitmap(n)
	}
	if boot == "" || string(b[:len(h)]) != h {
		return synced, synced.Clone()
	}
	if have, err = blob.ParseBitmap(n, b[len(h)+k:]); err != nil {
		return none, blob.NewBitmap(n)
	}
	return synced, have
}

// Partial opens a partial blob, resumed if some of it is there. ErrBusy when the whole blob is there already.
func (s *Store) Partial(m *blob.Metainfo) (*Partial, error) {
	d := m.Digest
	s.mu.Lock()
	if p := s.partials[d]; p != nil && p.m.InfoHash() == m.InfoHash() {
		p.refs++
		s.mu.Unlock()
		p.retry()
		return p, nil
	}
	s.mu.Unlock()
	if err := s.find(d); err != nil {
		return nil, fmt.Errorf("open partial blob: %w", err)
	}
	if s.taken(d) {
		return nil, fmt.Errorf("open partial blob: %w: %s", ErrBusy, d)
	}
	var on int64
	if fi, err := s.root.Stat(blobFile(d, fileData)); err == nil {
		on = occupied(fi)
	}
	if err := s.reserve(m.Size - on); err != nil {
		return nil, fmt.Errorf("open partial blob %s: %w", d, err)
	}
	p, fresh, err := s.openPartial(m)
	if !fresh {
		s.unreserve(m.Size - on)
	}
	if err != nil {
		return nil, fmt.Errorf("open partial blob %s: %w", d, err)
	}
	if fresh {
		go p.work()
	} else {
		p.retry()
	}
	return p, nil
}

// taken says that d is whole, or opened as a partial blob of other pieces.
func (s *Store) taken(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.partials[d] != nil || s.entries[d] != nil
}

// openPartial opens the files, or joins who did so meanwhile: then it is not fresh.
func (s *Store) openPartial(m *blob.Metainfo) (_ *Partial, fresh bool, err error) {
	d := m.Digest
	defer s.claim(blobDir(d))()
	s.mu.Lock()
	if p := s.partials[d]; p != nil && p.m.InfoHash() == m.InfoHash() {
		p.refs++
		s.mu.Unlock()
		return p, false, nil
	}
	s.mu.Unlock()
	if s.taken(d) {
		return nil, false, ErrBusy
	}
	p := &Partial{
		s: s, m: m, refs: 1, have: blob.NewBitmap(m.NumPieces()),
		kick: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{}), hash: d.Algorithm().Hash(),
	}
	synced := blob.NewBitmap(m.NumPieces())
	old, merr := s.Metainfo(d)
	if b, err := s.root.ReadFile(blobFile(d, filePieces)); err == nil && merr == nil && old.InfoHash() == m.InfoHash() {
		synced, p.have = decodePieces(s.root.Boot(), m.NumPieces(), b)
	}
	if err := s.makeBlobDir(d); err != nil {
		return nil, false, err
	}
	// The pieces file comes first: data without it would look like a whole blob.
	if err := s.writeFile(blobFile(d, filePieces), encodePieces(s.root.Boot(), synced, p.have)); err != nil {
		return nil, false, err
	}
	if err := s.describe(m); err != nil {
		return nil, false, err
	}
	defer func() {
		if err != nil {
			p.closeFiles()
		}
	}()
	if p.f, err = s.root.OpenFile(blobFile(d, fileData), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, false, err
	}
	if err := p.f.Truncate(m.Size); err != nil {
		return nil, false, s.noRoom(err)
	}
	if p.b, err = s.root.OpenFile(blobFile(d, filePieces), os.O_RDWR, 0o600); err != nil {
		return nil, false, err
	}
	p.synced = synced.Count()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.partials[d] = p
	return p, true, nil
}

// describe writes the metainfo of a partial blob beside it. Without it the blob is not resumed: that is how it is with
// a provisional one, whose pieces were checked against hashes that nobody has verified yet.
func (s *Store) describe(m *blob.Metainfo) error {
	if m.IsProvisional() {
		return s.remove(blobFile(m.Digest, fileMetainfo))
	}
	return s.writeFile(blobFile(m.Digest, fileMetainfo), m.Marshal())
}

func (p *Partial) closeFiles() {
	for _, f := range []*os.File{p.f, p.b} {
		if f != nil {
			f.Close()
		}
	}
}

// Metainfo describes the blob.
func (p *Partial) Metainfo() *blob.Metainfo { return p.m }

// Bitmap is a copy of what is verified.
func (p *Partial) Bitmap() blob.Bitmap {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.have.Clone()
}

// Has says whether piece i is verified.
func (p *Partial) Has(i int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.have.Has(i)
}

// Complete says that all pieces are verified.
func (p *Partial) Complete() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.have.Full()
}

// WriteAt writes bytes of pieces that are not verified yet.
func (p *Partial) WriteAt(b []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(b)) > p.m.Size {
		return 0, fmt.Errorf("write %d bytes at %d of %s: beyond its %d bytes", len(b), off, p.m.Digest, p.m.Size)
	}
	n, err := p.f.WriteAt(b, off)
	return n, p.s.noRoom(err)
}

// ReadAt reads what is there; only verified pieces mean anything to others.
func (p *Partial) ReadAt(b []byte, off int64) (int, error) { return p.f.ReadAt(b, off) }

// File is the data, to send pieces from it by sendfile; only verified pieces mean anything to others. It is closed
// after the last Close.
func (p *Partial) File() *os.File { return p.f }

// MarkVerified says that piece i was written and passed its hash.
func (p *Partial) MarkVerified(i int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i < 0 || i >= p.have.Len() {
		return fmt.Errorf("%s has no piece %d", p.m.Digest, i)
	}
	if p.have.Has(i) || p.over {
		return nil
	}
	p.have.Set(i)
	if err := p.writeBit(i); err != nil {
		p.s.log.Warn("a piece will be fetched again after a crash", "digest", p.m.Digest, "piece", i, "error", err)
	}
	p.changed.Wake()
	select {
	case p.kick <- struct{}{}:
	default:
	}
	return nil
}

// writeBit writes the byte of the live bitmap that has piece i.
func (p *Partial) writeBit(i int) error {
	b := p.have.Bytes()
	_, err := p.b.WriteAt(b[i/8:i/8+1], int64(len(piecesHeader(""))+len(b)+i/8))
	return err
}

// Wait blocks until piece i is verified, or until the partial blob has failed or ctx is done.
func (p *Partial) Wait(ctx context.Context, i int) error {
	for {
		p.mu.Lock()
		has, err, changed := p.have.Has(i), p.err, p.changed.C()
		p.mu.Unlock()
		if has {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// retry forgets why the last use failed. Who waits, also a reader of that use that has not looked yet, is served by the
// next one.
func (p *Partial) retry() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err = nil
}

// Fail ends the waiting of all readers with err, until the blob is opened the next time. Pieces that are there stay.
func (p *Partial) Fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = err
		p.changed.Wake()
	}
}

// work hashes the verified prefix as it grows, so that Commit has little left to read, and syncs now and then.
func (p *Partial) work() {
	defer close(p.done)
	t := time.NewTicker(flushInterval)
	defer t.Stop()
	for {
		select {
		case <-p.stop:
			return
		case <-t.C:
			if err := p.Flush(); err != nil {
				p.s.log.Warn("partial blob was not synced", "digest", p.m.Digest, "error", err)
			}
		case <-p.kick:
			for p.Has(p.hashed) {
				select {
				case <-p.stop:
					return
				default:
				}
				if err := p.hashPiece(); err != nil {
					p.s.log.Warn("partial blob was not hashed ahead", "digest", p.m.Digest, "error", err)
					break
				}
			}
		}
	}
}

func (p *Partial) hashPiece() error {
	off := int64(p.hashed) * p.m.PieceLength()
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	// A half-hashed piece would spoil the rest: the bytes go to the hash only once they all were read.
	n := p.m.PieceSize(p.hashed)
	for at := int64(0); at < n; {
		k := min(n-at, int64(len(*buf)))
		if _, err := p.f.ReadAt((*buf)[:k], off+at); err != nil {
			p.hash, p.hashed = p.m.Digest.Algorithm().Hash(), 0
			return err
		}
		p.hash.Write((*buf)[:k])
		at += k
	}
	p.hashed++
	return nil
}

// Flush makes what is verified survive a crash of the machine.
func (p *Partial) Flush() error {
	p.mu.Lock()
	have, stale := p.have.Clone(), !p.over && p.have.Count() != p.synced
	p.mu.Unlock()
	if !stale {
		return nil
	}
	if err := p.s.fsync(p.f); err != nil {
		return fmt.Errorf("sync partial blob %s: %w", p.m.Digest, err)
	}
	if err := p.writeSynced(have); err != nil {
		return fmt.Errorf("write bitmap of %s: %w", p.m.Digest, err)
	}
	return p.s.fsync(p.b)
}

// writeSynced writes the bitmap of the pieces that are on the disk, unless the blob has ended meanwhile.
func (p *Partial) writeSynced(have blob.Bitmap) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over {
		return nil
	}
	p.synced = have.Count()
	_, err := p.b.WriteAt(have.Bytes(), int64(len(piecesHeader(""))))
	return err
}

// Commit makes a whole blob of a partial one: all pieces must be verified, the digest of the whole is checked.
// ErrDigestMismatch: the pieces all passed and the whole is wrong, so the metainfo is; everything is removed. Readers
// of the partial blob read on either way.
func (p *Partial) Commit(ctx context.Context) (Info, error) { return p.CommitAs(ctx, p.m) }

// CommitAs is Commit for a partial blob whose metainfo was provisional, or is as m says: the blob has m from then on.
func (p *Partial) CommitAs(ctx context.Context, m *blob.Metainfo) (Info, error) {
	d := p.m.Digest
	p.ending.Lock()
	defer p.ending.Unlock()
	if !p.Complete() {
		return Info{}, fmt.Errorf("commit %s: %w: pieces are missing", d, ErrSizeMismatch)
	}
	p.stopWork()
	for p.hashed < p.m.NumPieces() {
		if ctx.Err() != nil {
			return Info{}, context.Cause(ctx)
		}
		if err := p.hashPiece(); err != nil {
			return Info{}, fmt.Errorf("commit %s: %w", d, err)
		}
	}
	if got := digest.NewDigest(d.Algorithm(), p.hash); got != d {
		err := fmt.Errorf("commit %s: %w: the content is %s", d, ErrDigestMismatch, got)
		return Info{}, errors.Join(err, p.discard())
	}
	if err := p.s.syncFile(p.f); err != nil {
		return Info{}, fmt.Errorf("commit %s: %w", d, err)
	}
	p.finish()
	s := p.s
	defer s.claim(blobDir(d))()
	if p.m.IsProvisional() {
		if err := s.describe(m); err != nil {
			return Info{}, fmt.Errorf("commit %s: %w", d, err)
		}
	}
	if err := s.remove(blobFile(d, filePieces)); err != nil {
		return Info{}, fmt.Errorf("commit %s: %w", d, err)
	}
	if err := s.syncDir(blobDir(d)); err != nil {
		return Info{}, fmt.Errorf("commit %s: %w", d, err)
	}
	disk, err := s.footprint(d)
	if err != nil {
		return Info{}, fmt.Errorf("commit %s: %w", d, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.partials, d)
	s.admit(d, p.m.Size, disk, nil)
	return Info{d, p.m.Size}, nil
}

func (p *Partial) finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over = true
}

func (p *Partial) stopWork() {
	p.mu.Lock()
	select {
	case <-p.stop:
	default:
		close(p.stop)
	}
	p.mu.Unlock()
	<-p.done
}

// discard removes everything of the partial blob.
func (p *Partial) discard() error {
	p.finish()
	s, d := p.s, p.m.Digest
	defer s.claim(blobDir(d))()
	err := s.removeAll(blobDir(d))
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.partials[d] == p {
		delete(s.partials, d)
		s.used -= p.m.Size
	}
	return err
}

// Close ends one user's use. After the last one the files are closed; what is there waits for the next Partial.
func (p *Partial) Close() error {
	p.s.mu.Lock()
	p.refs--
	last := p.refs == 0
	p.s.mu.Unlock()
	if !last {
		return nil
	}
	p.ending.Lock()
	defer p.ending.Unlock()
	if p.closed {
		return nil // who came back and left again was seen to by the one before
	}
	p.stopWork()
	err := p.Flush()
	p.s.mu.Lock()
	if p.refs > 0 { // somebody came back
		p.s.mu.Unlock()
		p.restart()
		return err
	}
	if p.s.partials[p.m.Digest] == p {
		delete(p.s.partials, p.m.Digest)
		if fi, serr := p.f.Stat(); serr == nil {
			p.s.used -= p.m.Size - occupied(fi)
		}
	}
	p.s.mu.Unlock()
	p.closed = true
	p.closeFiles()
	return err
}

func (p *Partial) restart() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stop, p.done = make(chan struct{}), make(chan struct{})
	go p.work()
}

// DropPartials removes partial blobs that nobody has open and nobody has written to for idle, and returns how many.
func (s *Store) DropPartials(idle time.Duration) (int, error) {
	limit := time.Now().Add(-idle)
	n := 0
	err := fs.WalkDir(s.root.FS(), "blobs", func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Name() != filePieces {
			return ignoreGone(err)
		}
		fi, err := e.Info()
		if err != nil || fi.ModTime().After(limit) {
			return ignoreGone(err)
		}
		dir := path.Dir(name)
		d, err := blob.ParseDigest(path.Base(path.Dir(path.Dir(dir))) + ":" + path.Base(dir))
		if err != nil {
			return nil
		}
		dropped, err := s.dropPartial(d)
		if dropped {
			n++
		}
		return err
	})
	return n, err
}

// dropPartial removes an idle partial blob, unless somebody uses it or has made a whole one of it.
func (s *Store) dropPartial(d digest.Digest) (bool, error) {
	if err := s.find(d); err != nil {
		return false, err
	}
	defer s.claim(blobDir(d))()
	if s.taken(d) || !s.has(d, filePieces) {
		return false, nil
	}
	s.supersede(d)
	return true, s.removeAll(blobDir(d))
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
