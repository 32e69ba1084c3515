package store

import (
	"context"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
)

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
	d := m.Digest
	if err := s.find(d); err != nil {
		return fmt.Errorf("put metainfo: %w", err)
	}
	defer s.claim(blobDir(d))()
	s.mu.Lock()
	e := s.entries[d]
	s.mu.Unlock()
	if e == nil || e.size != m.Size {
		return fmt.Errorf("put metainfo: %w: %s with %d bytes", ErrNotFound, d, m.Size)
	}
	// Not synced: a torn one is computed again. By a rename nevertheless, because it may be read meanwhile.
	tmp := blobFile(d, fileMetainfo) + ".new"
	if err := s.root.WriteFile(tmp, m.Marshal(), 0o600); err != nil {
		return fmt.Errorf("put metainfo of %s: %w", d, err)
	}
	if err := s.root.Rename(tmp, blobFile(d, fileMetainfo)); err != nil {
		return fmt.Errorf("put metainfo of %s: %w", d, err)
	}
	s.recount(d)
	return nil
}

// DropMetainfo forgets the metainfo of a whole blob.
func (s *Store) DropMetainfo(d digest.Digest) error {
	if err := s.find(d); err != nil {
		return fmt.Errorf("drop metainfo: %w", err)
	}
	defer s.claim(blobDir(d))()
	defer s.recount(d)
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
