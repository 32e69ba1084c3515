package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
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
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[d]
	if e == nil {
		return Info{}, fmt.Errorf("%w: %s", ErrNotFound, d)
	}
	return Info{d, e.size}, nil
}

// Open opens a whole blob for reading and counts as an access.
func (s *Store) Open(d digest.Digest) (*Reader, error) {
	s.mu.Lock()
	e := s.entries[d]
	if e == nil {
		s.mu.Unlock()
		return nil, fmt.Errorf("%w: %s", ErrNotFound, d)
	}
	e.open++
	now := time.Now()
	stale := now.Sub(e.access) > time.Minute
	e.access = now
	s.mu.Unlock()
	release := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		e.open--
	}
	f, err := s.root.Open(blobFile(d, fileData))
	if err != nil {
		release()
		return nil, fmt.Errorf("open blob %s: %w", d, err)
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
	}}, nil
}

// List calls fn for every whole blob, until fn fails.
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
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[d]
	if e == nil {
		return fmt.Errorf("delete blob: %w: %s", ErrNotFound, d)
	}
	if e.marked {
		return fmt.Errorf("delete blob %s: %w", d, ErrMarked)
	}
	return s.drop(d, e)
}

// drop removes a blob's folder; the store's lock is held.
func (s *Store) drop(d digest.Digest, e *entry) error {
	delete(s.entries, d)
	s.used -= e.disk
	if err := s.root.RemoveAll(blobDir(d)); err != nil {
		return fmt.Errorf("remove blob %s: %w", d, err)
	}
	return nil
}

// Ingest streams a blob to disk, verifies it and commits it. Nothing stays when it fails. size is -1 when not known.
func (s *Store) Ingest(ctx context.Context, d digest.Digest, size int64, r io.Reader, m *Marker) (Info, error) {
	if i, err := s.Stat(d); err == nil {
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
	i, err := u.Commit(ctx, d, m)
	if err != nil {
		if aerr := u.Abort(); aerr != nil && !errors.Is(aerr, ErrUploadUnknown) {
			err = errors.Join(err, aerr)
		}
		return Info{}, fmt.Errorf("ingest %s: %w", d, err)
	}
	return i, nil
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// Metainfo is what is known of the pieces of a whole or partial blob, ErrNotFound when nothing is.
func (s *Store) Metainfo(d digest.Digest) (*blob.Metainfo, error) {
	b, err := s.root.ReadFile(blobFile(d, fileMetainfo))
	if err != nil {
		return nil, fmt.Errorf("metainfo: %w: %s", ErrNotFound, d)
	}
	m, err := blob.ParseMetainfo(b)
	if err == nil && m.Digest != d {
		err = blob.ErrMetainfoInvalid
	}
	if err != nil {
		return nil, fmt.Errorf("metainfo of %s on disk: %w", d, err)
	}
	return m, nil
}

// PutMetainfo stores the metainfo beside a blob that is there.
func (s *Store) PutMetainfo(m *blob.Metainfo) error {
	s.mu.Lock()
	e := s.entries[m.Digest]
	s.mu.Unlock()
	if e == nil || e.size != m.Size {
		return fmt.Errorf("put metainfo: %w: %s with %d bytes", ErrNotFound, m.Digest, m.Size)
	}
	// Not synced: a torn one is computed again. By a rename nevertheless, because it may be read meanwhile.
	defer s.claim(blobFile(m.Digest, fileMetainfo))()
	tmp := blobFile(m.Digest, fileMetainfo) + ".new"
	if err := s.root.WriteFile(tmp, m.Marshal(), 0o600); err != nil {
		return fmt.Errorf("put metainfo of %s: %w", m.Digest, err)
	}
	if err := s.root.Rename(tmp, blobFile(m.Digest, fileMetainfo)); err != nil {
		return fmt.Errorf("put metainfo of %s: %w", m.Digest, err)
	}
	s.settle(m.Digest)
	return nil
}

// DropMetainfo forgets the metainfo of a whole blob.
func (s *Store) DropMetainfo(d digest.Digest) error {
	defer s.settle(d)
	return s.remove(blobFile(d, fileMetainfo))
}

// ComputeMetainfo reads the blob once and stores its metainfo.
func (s *Store) ComputeMetainfo(ctx context.Context, d digest.Digest) (*blob.Metainfo, error) {
	r, err := s.Open(d)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	h := blob.NewPieceHasher(r.info.Size)
	buf := make([]byte, 1<<20)
	_, err = io.CopyBuffer(struct{ io.Writer }{h}, readerFunc(func(b []byte) (int, error) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return r.f.Read(b)
	}), buf)
	if err != nil {
		return nil, fmt.Errorf("hash pieces of %s: %w", d, err)
	}
	m, err := h.Sum(d)
	if err != nil {
		return nil, fmt.Errorf("hash pieces of %s: %w", d, err)
	}
	return m, s.PutMetainfo(m)
}
