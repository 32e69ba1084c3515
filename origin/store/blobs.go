package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// Reader is an open whole blob. It is not evicted before Close.
type Reader struct {
	f     *os.File
	info  Info
	once  sync.Once
	close func() error
}

// File is the blob's file, for sendfile. Its offset belongs to this Reader.
func (r *Reader) File() *os.File { return r.f }

// Info describes the blob.
func (r *Reader) Info() Info { return r.info }

// Close ends the use; further calls do nothing.
func (r *Reader) Close() (err error) {
	r.once.Do(func() { err = r.close() })
	return err
}

// Stat describes a whole blob, ErrNotFound when there is none (a partial one is none).
func (s *Store) Stat(d digest.Digest) (Info, error) {
	if err := s.find(d); err != nil {
		return Info{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[d]
	if e == nil {
		return Info{}, fmt.Errorf("%w: %s", ErrNotFound, d)
	}
	return Info{d, e.size}, nil
}

// Open opens a whole blob for reading and counts as an access. A blob whose file somebody else has removed or shortened
// is forgotten: ErrNotFound.
func (s *Store) Open(d digest.Digest) (*Reader, error) {
	r, lost, err := s.open(d, func(e *entry) *int { return &e.open })
	if lost {
		s.evicted([]digest.Digest{d})
	}
	return r, err
}

// OpenYielding is Open for who has no need to keep the blob: it is evicted nevertheless, after what nobody has open.
// The reader goes on to work; OnEvict tells its owner to close it, which gives back the space.
func (s *Store) OpenYielding(d digest.Digest) (*Reader, error) {
	r, lost, err := s.open(d, func(e *entry) *int { return &e.yielding })
	if lost { // OnEvict leads to the caller, which may have locks
		s.background(func() { s.evicted([]digest.Digest{d}) })
	}
	return r, err
}

// OpenVerified is Open that reads and hashes the blob first, which is worth it for small ones. One that has rotted is
// removed, and what it owes stays owed: ErrNotFound.
func (s *Store) OpenVerified(ctx context.Context, d digest.Digest) (*Reader, error) {
	r, err := s.openVerified(ctx, d)
	if errors.Is(err, ErrDigestMismatch) { // right bytes have come in the place of those that were read
		r, err = s.openVerified(ctx, d)
	}
	return r, err
}

// openVerified is one try of OpenVerified. ErrDigestMismatch where the bytes that it has read were wrong, and those
// that are there are right.
func (s *Store) openVerified(ctx context.Context, d digest.Digest) (*Reader, error) {
	r, err := s.Open(d)
	if err != nil {
		return nil, err
	}
	v := d.Verifier()
	_, err = io.Copy(v, r.f)
	if err == nil && v.Verified() {
		if _, err = r.f.Seek(0, io.SeekStart); err == nil {
			return r, nil
		}
	}
	err = errors.Join(err, r.Close())
	switch serr := s.Scrub(ctx, d); {
	case serr == nil: // the disk has the right bytes, and gave others, or none, or others are there by now
		return nil, errors.Join(fmt.Errorf("open blob %s: %w", d, ErrDigestMismatch), err)
	case errors.Is(serr, ErrDigestMismatch), errors.Is(serr, ErrNotFound):
		return nil, fmt.Errorf("%w: %s", ErrNotFound, d)
	default:
		return nil, serr
	}
}

// open counts the reader among users. lost says that the blob was forgotten, which OnEvict has to be told.
func (s *Store) open(d digest.Digest, users func(*entry) *int) (r *Reader, lost bool, err error) {
	if err := s.find(d); err != nil {
		return nil, false, err
	}
	s.mu.Lock()
	e := s.entries[d]
	if e == nil {
		s.mu.Unlock()
		return nil, false, fmt.Errorf("%w: %s", ErrNotFound, d)
	}
	*users(e)++
	now := time.Now()
	stale := now.Sub(e.access) > time.Minute
	e.access = now
	s.mu.Unlock()
	release := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		*users(e)--
	}
	f, err := s.root.Open(blobFile(d, fileData))
	if err == nil {
		err = checkLength(f, e.size)
	}
	if err != nil {
		release()
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrSizeMismatch) {
			return nil, s.lose(d, e, err), fmt.Errorf("%w: %s", ErrNotFound, d)
		}
		return nil, false, fmt.Errorf("open blob %s: %w", d, err)
	}
	if stale {
		// The time of the last access survives a restart, to the minute.
		if err := s.root.Chtimes(blobFile(d, fileData), now, now); err != nil {
			s.log.Debug("access time was not kept", "digest", d, "error", err)
		}
	}
	return &Reader{f: f, info: Info{d, e.size}, close: func() error {
		release()
		return f.Close()
	}}, false, nil
}

// checkLength closes a file that does not have size bytes.
func checkLength(f *os.File, size int64) error {
	fi, err := f.Stat()
	if err == nil && fi.Size() != size {
		err = fmt.Errorf("%w: the file has %d bytes, the blob %d", ErrSizeMismatch, fi.Size(), size)
	}
	if err != nil {
		f.Close()
	}
	return err
}

// List calls fn for every whole blob that is known, until fn fails.
func (s *Store) List(fn func(Info) error) error {
	s.mu.Lock()
	infos := make([]Info, 0, len(s.entries))
	for d, e := range s.entries {
		infos = append(infos, Info{d, e.size})
	}
	s.mu.Unlock()
	for _, i := range infos {
		if err := fn(i); err != nil {
			return err
		}
	}
	return nil
}

// Delete removes a whole blob. ErrMarked while it waits for write-back, ErrNotFound when it is not there.
// Readers that have it open read on.
func (s *Store) Delete(d digest.Digest) error {
	err := s.removeWhole(d, func(*entry) error {
		if s.owes(d) {
			return ErrMarked
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("delete blob %s: %w", d, err)
	}
	return nil
}

// Ingest streams a blob to disk, verifies it and commits it. Nothing stays when it fails. size may be SizeUnknown.
func (s *Store) Ingest(ctx context.Context, d digest.Digest, size int64, r io.Reader, m *Marker) (Info, error) {
	i, err := s.Stat(d)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return Info{}, err
	}
	if err == nil {
		if m != nil {
			return i, s.Mark(d, *m)
		}
		return i, nil
	}
	u, err := s.NewUpload(UploadOptions{Size: size, Digest: d, Transient: true})
	if err != nil {
		return Info{}, fmt.Errorf("ingest %s: %w", d, err)
	}
	if _, err := u.Write(ctx, 0, r); err != nil {
		return Info{}, errors.Join(fmt.Errorf("ingest %s: %w", d, err), u.Abort())
	}
	if i, err = u.Commit(ctx, d, m); err != nil {
		if aerr := u.Abort(); aerr != nil && !errors.Is(aerr, ErrUploadUnknown) {
			err = errors.Join(err, aerr)
		}
		return Info{}, fmt.Errorf("ingest %s: %w", d, err)
	}
	return i, nil
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// Recent lists the whole blobs that were used since a time and that keep wants, the latest first, at most n.
func (s *Store) Recent(since time.Time, n int, keep func(Info) bool) []Info {
	type used struct {
		Info
		at time.Time
	}
	var all []used
	s.mu.Lock()
	for d, e := range s.entries {
		if !e.access.Before(since) {
			all = append(all, used{Info{d, e.size}, e.access})
		}
	}
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b used) int { return cmp.Or(b.at.Compare(a.at), cmp.Compare(a.Digest, b.Digest)) })
	out := make([]Info, 0, min(n, len(all)))
	for _, u := range all {
		if len(out) == n {
			break
		}
		if keep(u.Info) {
			out = append(out, u.Info)
		}
	}
	return out
}

// Touch counts as an access of those of ds that are there, like Open.
func (s *Store) Touch(ds ...digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	for _, d := range ds {
		if e := s.entries[d]; e != nil {
			e.access = now
		}
	}
}
