package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
)

// OffsetError is a chunk that does not start where the session stands.
type OffsetError struct{ Want, Got int64 }

func (e *OffsetError) Error() string {
	return fmt.Sprintf("chunk starts at byte %d, the upload stands at byte %d", e.Got, e.Want)
}

// UploadOptions is what is known when a session starts. It is kept on disk beside the bytes, unless the session is
// transient.
type UploadOptions struct {
	ID     string        `json:"-"`                // [a-z0-9-]{1,64}; made up when empty
	Size   int64         `json:"size"`             // of the whole blob in bytes, or SizeUnknown
	Digest digest.Digest `json:"digest,omitempty"` // empty when not known
	Note   string        `json:"note,omitempty"`   // the caller's, e.g. the repository
	Source string        `json:"source,omitempty"` // whose client began it: bounds hold for each source

	// Transient says that nobody resumes the session after a restart: it is not kept on disk, and its bytes go with the
	// process.
	Transient bool `json:"-"`
	// NoMetainfo says that the blob is too small to be seeded, so no metainfo is made of it.
	NoMetainfo bool `json:"-"`
}

// Upload is a session: bytes on their way to a blob. It survives a restart unless it is transient. One writer at a
// time.
type Upload struct {
	s       *Store
	id      string
	o       UploadOptions
	off     atomic.Int64
	touched atomic.Int64 // Unix seconds

	mu     sync.Mutex // held by the writer
	f      *os.File   // nil before the first write and after the end
	sha    hash.Hash  // SHA-256 of the first hashed bytes
	hashed int64
	pieces *blob.PieceHasher // nil when the size is not known, the session was resumed, or none are wanted
	ended  bool
	last   *int64 // where the last WriteLast began, nil when something else came since

	growth atomic.Pointer[Growth] // nil when nobody reads it while it is written

	staged   bool // a commit that failed may have left files
	adopted  bool // its bytes are a blob's now
	renamed  bool // its folder, too
	replaces bool // they took the place of a file that had rotted
}

var uploadID = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)

// writeBehind is after how many bytes the kernel is asked to start writing them to the disk, so that the fsync at the
// end has little left to do.
const writeBehind = 8 << 20

func uploadFile(id, name string) string { return path.Join("uploads", id, name) }

// NewUpload starts a session.
func (s *Store) NewUpload(o UploadOptions) (*Upload, error) {
	if o.ID == "" {
		o.ID = rand.Text()
		o.ID = string(toLower([]byte(o.ID)))
	}
	if !uploadID.MatchString(o.ID) {
		return nil, fmt.Errorf("upload id %.80q: want %s", o.ID, uploadID)
	}
	b, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	if err := s.beginSession(o); err != nil {
		return nil, fmt.Errorf("start upload: %w", err)
	}
	if err = s.makeFolderRoom(); err == nil {
		err = s.ups.Mkdir(o.ID, 0o700)
	}
	if err == nil && !o.Transient {
		if err = s.ups.WriteFile(path.Join(o.ID, fileSession), b, 0o600); err != nil {
			err = errors.Join(err, s.ups.RemoveAll(o.ID))
		}
	}
	if err != nil {
		s.endSession(o, 0)
		return nil, fmt.Errorf("start upload: %w", err)
	}
	u := &Upload{s: s, id: o.ID, o: o, sha: digest.SHA256.Hash()}
	if o.Size >= 0 && o.Size <= blob.MaxSize && !o.NoMetainfo {
		u.pieces = blob.NewPieceHasher(o.Size)
	}
	u.touch()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.uploads[o.ID] = u
	return u, nil
}

func toLower(b []byte) []byte {
	for i, c := range b {
		if c >= 'A' && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return b
}

// scanUploads finds the sessions of the last run.
func (s *Store) scanUploads() error {
	dirs, err := fs.ReadDir(s.root.FS(), "uploads")
	if err != nil {
		return err
	}
	for _, e := range dirs {
		var o UploadOptions
		b, err := s.root.ReadFile(uploadFile(e.Name(), fileSession))
		if err != nil || json.Unmarshal(b, &o) != nil || !uploadID.MatchString(e.Name()) {
			if err := s.root.RemoveAll(path.Join("uploads", e.Name())); err != nil {
				return err
			}
			continue
		}
		o.ID = e.Name()
		u := &Upload{s: s, id: o.ID, o: o, sha: digest.SHA256.Hash(), staged: true}
		u.touch()
		if fi, err := s.root.Stat(uploadFile(o.ID, fileData)); err == nil {
			u.off.Store(fi.Size())
			u.touched.Store(fi.ModTime().Unix())
			s.used += fi.Size()
		} else if o.Size >= 0 && o.Size <= blob.MaxSize {
			u.pieces = blob.NewPieceHasher(o.Size)
		}
		s.sessions.add(o.Source, 1, u.off.Load())
		s.uploads[o.ID] = u
	}
	return nil
}

// Upload returns a session, ErrUploadUnknown when there is none.
func (s *Store) Upload(id string) (*Upload, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u := s.uploads[id]; u != nil {
		return u, nil
	}
	return nil, fmt.Errorf("%w: %.64q", ErrUploadUnknown, id)
}

// ExpireUploads removes sessions that nobody has written to for idle, and returns how many. One that is being written
// or committed now stays.
func (s *Store) ExpireUploads(idle time.Duration) int {
	limit := time.Now().Add(-idle).Unix()
	s.mu.Lock()
	var old []*Upload
	for _, u := range s.uploads {
		if u.touched.Load() < limit {
			old = append(old, u)
		}
	}
	s.mu.Unlock()
	n := 0
	for _, u := range old {
		if u.expire(limit) {
			n++
		}
	}
	return n
}

// expire ends the session unless somebody is at it, or was since then, in Unix seconds.
func (u *Upload) expire(since int64) bool {
	if !u.mu.TryLock() {
		return false
	}
	defer u.mu.Unlock()
	if u.ended || u.touched.Load() >= since {
		return false
	}
	if err := u.end(); err != nil {
		u.s.log.Warn("an idle upload session stays on the disk until the next start", "upload", u.id, "error", err)
	}
	return true
}

func (u *Upload) touch() { u.touched.Store(time.Now().Unix()) }

// ID names the session.
func (u *Upload) ID() string { return u.id }

// Note is the caller's note of the start.
func (u *Upload) Note() string { return u.o.Note }

// Size is the size that was announced, or SizeUnknown.
func (u *Upload) Size() int64 { return u.o.Size }

// Offset is the number of bytes received.
func (u *Upload) Offset() int64 { return u.off.Load() }

// Reader opens what was received and what will be, for following a session while it is written. It stays valid when the
// session becomes a blob. The caller closes it.
func (u *Upload) Reader() (*os.File, error) {
	f, err := u.s.ups.OpenFile(path.Join(u.id, fileData), os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("follow upload %s: %w", u.id, err)
	}
	return f, nil
}

var buffers = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

// Write appends r at off, which must be the session's offset, or AtEnd. What arrived before an
// error stays; Offset is true in any case. ErrBusy when another writer is at it.
func (u *Upload) Write(ctx context.Context, off int64, r io.Reader) (n int64, err error) {
	if !u.mu.TryLock() {
		return 0, fmt.Errorf("write upload %s: %w", u.id, ErrBusy)
	}
	defer u.mu.Unlock()
	u.last = nil
	return u.write(ctx, off, r)
}

// write is Write for who holds u.mu.
func (u *Upload) write(ctx context.Context, off int64, r io.Reader) (n int64, err error) {
	defer u.touch()
	if u.ended {
		return 0, fmt.Errorf("%w: %s", ErrUploadUnknown, u.id)
	}
	at := u.off.Load()
	if off >= 0 && off != at {
		return 0, &OffsetError{Want: at, Got: off}
	}
	done, err := u.s.beginWrite(u.o)
	if err != nil {
		return 0, err
	}
	defer done()
	if err := u.open(); err != nil {
		return 0, err
	}
	defer u.park()
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	flushed := at
	for {
		if ctx.Err() != nil {
			return n, context.Cause(ctx)
		}
		k, rerr := r.Read(*buf)
		if k > 0 {
			if err := u.append((*buf)[:k], at); err != nil {
				return n, err
			}
			at += int64(k)
			n += int64(k)
			if at-flushed >= writeBehind {
				u.writeBehind(flushed, at-flushed)
				flushed = at
			}
		}
		if rerr == io.EOF {
			return n, nil
		}
		if rerr != nil {
			return n, fmt.Errorf("receive upload %s: %w", u.id, rerr)
		}
	}
}

// writeBehind only starts the kernel's writing; durability comes from the fsync at commit.
func (u *Upload) writeBehind(off, n int64) {
	const syncFileRangeWrite = 2 // SYNC_FILE_RANGE_WRITE, sync_file_range(2)
	if err := syscall.SyncFileRange(int(u.f.Fd()), off, n, syncFileRangeWrite); err != nil {
		u.s.log.Debug("early write-out is not available", "error", err)
	}
}

func (u *Upload) open() error {
	if u.f != nil {
		return nil
	}
	f, err := u.s.ups.OpenFile(path.Join(u.id, fileData), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("open upload %s: %w", u.id, err)
	}
	u.f = f
	return nil
}

func (u *Upload) append(b []byte, at int64) error {
	if u.o.Size >= 0 && at+int64(len(b)) > u.o.Size {
		return fmt.Errorf("upload %s: %w: more than the %d bytes that were announced", u.id, ErrSizeMismatch, u.o.Size)
	}
	if err := u.s.chargeSession(u.o, at, int64(len(b))); err != nil {
		return fmt.Errorf("upload %s: %w", u.id, err)
	}
	if err := u.s.reserve(int64(len(b))); err != nil {
		u.s.unchargeSession(u.o, int64(len(b)))
		return fmt.Errorf("upload %s: %w", u.id, err)
	}
	if _, err := u.f.WriteAt(b, at); err != nil {
		u.s.unchargeSession(u.o, int64(len(b)))
		u.s.unreserve(int64(len(b)))
		return fmt.Errorf("upload %s: %w", u.id, u.s.noRoom(err))
	}
	if u.hashed == at {
		u.sha.Write(b)
		u.hashed += int64(len(b))
		if u.pieces != nil {
			if _, err := u.pieces.Write(b); err != nil {
				u.pieces = nil
			}
		}
	}
	u.off.Store(at + int64(len(b)))
	if g := u.growth.Load(); g != nil {
		var pieces []byte
		if u.pieces != nil {
			pieces = u.pieces.Pieces()
		}
		g.wake(pieces)
	}
	u.touch()
	return nil
}

// Commit verifies the bytes against d and makes them a blob, durably, by renaming: nothing is copied. The marker, if
// any, is durable before the blob is visible. ErrDigestMismatch ends the session and nothing of it stays.
func (u *Upload) Commit(ctx context.Context, d digest.Digest, m *Marker) (Info, error) {
	if _, err := blob.ParseDigest(d.String()); err != nil {
		return Info{}, err
	}
	if !u.mu.TryLock() {
		return Info{}, fmt.Errorf("commit upload %s: %w", u.id, ErrBusy)
	}
	defer u.mu.Unlock()
	if u.ended {
		return Info{}, fmt.Errorf("%w: %s", ErrUploadUnknown, u.id)
	}
	size := u.off.Load()
	if u.o.Size >= 0 && size != u.o.Size {
		return Info{}, fmt.Errorf("commit %s: %w: %d bytes came, %d were announced", d, ErrSizeMismatch, size, u.o.Size)
	}
	if err := u.open(); err != nil { // a blob of 0 bytes may come without a write
		return Info{}, err
	}
	defer u.park()
	if err := u.verify(ctx, d, size); err != nil {
		if errors.Is(err, ErrDigestMismatch) {
			err = errors.Join(err, u.end())
		}
		return Info{}, fmt.Errorf("commit upload %s: %w", u.id, err)
	}
	if err := u.s.adopt(u, d, size, m); err != nil {
		return Info{}, fmt.Errorf("commit %s: %w", d, err)
	}
	if u.replaces {
		u.s.scrub.rotten.Add(1)
		u.s.log.Error("a blob was rotten, and is replaced by what was pushed", "digest", d, "size", size)
		u.s.evicted([]digest.Digest{d}) // who has the old file open lets go of it
	}
	return Info{d, size}, u.end()
}

func (u *Upload) verify(ctx context.Context, d digest.Digest, size int64) error {
	if d.Algorithm() == digest.SHA256 && u.hashed == size {
		if got := digest.NewDigest(digest.SHA256, u.sha); got != d {
			return fmt.Errorf("%w: the content is %s, not %s", ErrDigestMismatch, got, d)
		}
		return nil
	}
	// Another algorithm than was guessed, or a resumed session: one more pass.
	v := d.Verifier()
	whole := io.NewSectionReader(u.f, 0, size)
	_, err := io.Copy(v, readerFunc(func(b []byte) (int, error) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return whole.Read(b)
	}))
	if err != nil {
		return err
	}
	if !v.Verified() {
		return fmt.Errorf("%w: not %s", ErrDigestMismatch, d)
	}
	return nil
}

// adopt makes the session's folder the blob's. All that belongs to the blob is made durable there first, so that what
// becomes visible is whole, and owed to the bucket; nobody sees the blob before its name is durable, too. Only the
// steps that others must not see half done take the lock: commits wait for the disk together, not one after the other.
func (s *Store) adopt(u *Upload, d digest.Digest, size int64, m *Marker) error {
	if err := s.find(d); err != nil {
		return err
	}
	defer s.claim(blobDir(d))()
	m, complete := s.takeOver(d, m)
	if err := s.place(u, d, size, m); err != nil || !complete {
		return err
	}
	if err := s.dropDebt(d); err != nil { // it is settled again once the marker is
		s.log.Warn("a debt is written down twice", "digest", d, "error", err)
	}
	return nil
}

// place is adopt with the blob's folder claimed.
func (s *Store) place(u *Upload, d digest.Digest, size int64, m *Marker) error {
	s.mu.Lock()
	old, partial := s.entries[d], s.partials[d] != nil
	s.mu.Unlock()
	if partial {
		return fmt.Errorf("%w: %s is being fetched", ErrBusy, d)
	}
	if old != nil {
		same, err := s.sameBytes(u, d, size)
		switch {
		case err != nil:
			return err
		case same && m == nil:
			return nil
		case same:
			if _, err := s.mark(d, *m); err != nil {
				return err
			}
			s.recount(d)
			return nil
		}
		if owed, err := s.readMarker(d); m == nil && err == nil {
			m = &owed
		}
		u.replaces = true
	}
	if err := s.makeShard(d); err != nil {
		return err
	}
	if err := u.stage(d, size, m); err != nil {
		return err
	}
	disk, known := u.footprint(m)
	err := s.root.Rename(path.Join("uploads", u.id), blobDir(d))
	switch {
	case errors.Is(err, fs.ErrExist):
		known = false
		m, err = s.moveInto(u, d, m)
	case err == nil:
		u.renamed = true
		if !u.o.Transient {
			err = s.remove(blobFile(d, fileSession))
		}
	}
	if err == nil {
		err = s.syncDir(path.Dir(blobDir(d)))
	}
	if err == nil && !known {
		disk, err = s.footprint(d)
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old != nil {
		s.used -= old.disk
	}
	s.admit(d, size, disk, m)
	u.adopted = true
	return nil
}

// sameBytes reports whether the file of a whole blob has the bytes of a session that was verified. One that has others
// has rotted, and who pushed the blob again has brought what it should be.
func (s *Store) sameBytes(u *Upload, d digest.Digest, size int64) (bool, error) {
	f, err := s.root.Open(blobFile(d, fileData))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("compare %s with what is there: %w", d, err)
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || fi.Size() != size {
		return false, err
	}
	a, b := buffers.Get().(*[]byte), buffers.Get().(*[]byte)
	defer buffers.Put(a)
	defer buffers.Put(b)
	for at := int64(0); at < size; {
		n := min(size-at, int64(len(*a)), int64(len(*b)))
		if _, err := u.f.ReadAt((*a)[:n], at); err != nil {
			return false, fmt.Errorf("compare %s with what is there: %w", d, err)
		}
		if _, err := f.ReadAt((*b)[:n], at); err != nil || !bytes.Equal((*a)[:n], (*b)[:n]) {
			return false, nil // a disk that can't give the bytes back has lost them
		}
		at += n
	}
	return true, nil
}

// footprint returns what the session's folder takes on disk as that of a blob; known is false when that is to be found
// out file by file.
func (u *Upload) footprint(m *Marker) (disk int64, known bool) {
	if m != nil || u.pieces != nil || !u.o.Transient {
		return 0, false
	}
	data, err := u.f.Stat()
	if err != nil {
		return 0, false
	}
	dir, err := u.s.ups.Stat(u.id)
	if err != nil {
		return 0, false
	}
	return allocated(data) + allocated(dir), true
}

// stage makes durable in the session's folder what the blob's will have.
func (u *Upload) stage(d digest.Digest, size int64, m *Marker) error {
	if u.staged {
		for _, name := range []string{fileMarker, fileMetainfo} {
			if err := u.s.remove(uploadFile(u.id, name)); err != nil {
				return err
			}
		}
	}
	u.staged = true
	if u.pieces != nil && u.hashed == size {
		if mi, err := u.pieces.Sum(d); err == nil {
			// Not synced: a torn one is computed again.
			if err := u.s.ups.WriteFile(path.Join(u.id, fileMetainfo), mi.Marshal(), 0o600); err != nil {
				return err
			}
		}
	}
	if u.s.cfg.Volatile {
		// What torn goes by: the folder's time is that of the commit, also where nothing was made in it.
		now := time.Now()
		if err := u.s.ups.Chtimes(u.id, now, now); err != nil {
			return err
		}
	}
	syncs := []func() error{func() error { return u.s.syncFile(u.f) }, func() error { return u.s.syncDir(path.Join("uploads", u.id)) }}
	if m != nil {
		b, err := json.Marshal(m)
		if err != nil {
			return err
		}
		f, err := u.s.ups.OpenFile(path.Join(u.id, fileMarker), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.Write(b); err != nil {
			return u.s.noRoom(err)
		}
		syncs = append(syncs, func() error { return u.s.fsync(f) })
	}
	// At once: a journal makes one commit of them.
	errs := make([]error, len(syncs))
	var wg sync.WaitGroup
	for i, sync := range syncs {
		wg.Go(func() { errs[i] = sync() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// moveInto moves the session's files into a folder that is there already: that of an idle partial download of the same
// blob, or of a commit that failed after its rename. It returns the marker that the blob has now. The blob's folder is
// claimed.
func (s *Store) moveInto(u *Upload, d digest.Digest, m *Marker) (*Marker, error) {
	if m != nil {
		merged, err := s.mark(d, *m)
		if err != nil {
			return m, err
		}
		m = &merged
	}
	err := s.root.Rename(uploadFile(u.id, fileMetainfo), blobFile(d, fileMetainfo))
	if errors.Is(err, fs.ErrNotExist) {
		err = s.remove(blobFile(d, fileMetainfo)) // the partial's, which nobody has checked
	}
	if err != nil {
		return m, err
	}
	s.supersede(d)
	if err := s.root.Rename(uploadFile(u.id, fileData), blobFile(d, fileData)); err != nil {
		return m, err
	}
	// The bitmap goes after its data was replaced.
	if err := s.remove(blobFile(d, filePieces)); err != nil {
		return m, err
	}
	return m, s.syncDir(blobDir(d))
}

// Abort ends the session; nothing of it stays.
func (u *Upload) Abort() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.ended {
		return fmt.Errorf("%w: %s", ErrUploadUnknown, u.id)
	}
	return u.end()
}

// end forgets the session; u.mu is held.
func (u *Upload) end() error {
	u.ended = true
	if u.f != nil {
		u.f.Close()
		u.f = nil
	}
	u.s.mu.Lock()
	delete(u.s.uploads, u.id)
	if !u.adopted {
		u.s.used -= u.off.Load()
	}
	u.s.mu.Unlock()
	u.s.endSession(u.o, u.off.Load())
	if u.renamed && u.adopted {
		return nil
	}
	if err := u.s.ups.RemoveAll(u.id); err != nil {
		return fmt.Errorf("remove upload %s: %w", u.id, err)
	}
	return nil
}

func (u *Upload) closeFile() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.f != nil {
		u.f.Close()
		u.f = nil
	}
}
