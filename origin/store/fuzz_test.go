package store

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
)

// FuzzDisk puts whatever a disk may have become in the place of one of the store's own files. The store refuses to
// open, or works: what it gives for whole is whole, what is broken is done again, and a blob comes in.
func FuzzDisk(f *testing.F) {
	content := bytes.Repeat([]byte("0123456"), 2*blob.MinPieceLength/7+1)
	m := metainfoOf(f, content)
	d := m.Digest
	session := "0123456789abcdef0123456789abcdef"
	files := []string{
		blobFile(d, "metainfo"), blobFile(d, fileMarker), blobFile(d, filePieces), uploadFile(session, fileSession), fileSynced, "format",
		"names/" + string(bytes.Repeat([]byte("a"), 64)), "pins/sha256-x", blobFile(d, fileData),
	}
	f.Add(0, m.Marshal())
	f.Add(1, []byte(`{"targets":["main"],"repositories":["a"],"created":"2026-01-01T00:00:00Z"}`))
	f.Add(2, encodePieces(bootID(), blob.NewBitmap(m.NumPieces()), blob.NewBitmap(m.NumPieces())))
	f.Add(3, []byte(`{"Size":-5,"Digest":"../../x","Offset":9223372036854775807}`))
	f.Add(4, []byte("boot -9223372036854775808\n"))
	f.Add(5, []byte("2\n"))
	f.Add(8, content[:100])
	f.Fuzz(func(t *testing.T, which int, b []byte) {
		if which < 0 || which >= len(files) {
			return
		}
		dir := t.TempDir()
		file := filepath.Join(dir, files[which])
		for _, sub := range []string{"blobs", "uploads", "names", filepath.Dir(files[which])} {
			if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if which < 3 { // a sidecar: of a whole blob, or for the bitmap of a part
			if err := os.WriteFile(filepath.Join(dir, blobFile(d, fileData)), content, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
		s, err := Open(Config{Dir: dir})
		if err != nil {
			return
		}
		defer s.Close()
		use(t, s, m, content, session)
	})
}

// use does with a store what a role does.
func use(t *testing.T, s *Store, m *blob.Metainfo, content []byte, session string) {
	t.Helper()
	d := m.Digest
	for _, marked := range s.Marked() {
		s.Marker(marked) // an error is fine, a panic is not
	}
	if u, err := s.Upload(session); err == nil && u.Offset() < 0 {
		t.Errorf("an upload at %d", u.Offset())
	}
	if mi, err := s.Metainfo(d); err == nil && (mi.Digest != d || mi.Size != m.Size) {
		t.Errorf("metainfo of %s, %d bytes", mi.Digest, mi.Size)
	}
	if p, err := s.Partial(m); err == nil {
		for i := range m.NumPieces() {
			p.Has(i)
		}
		if err := p.Close(); err != nil {
			t.Errorf("close a partial blob: %v", err)
		}
	}
	other := []byte("another blob")
	od := digest.FromBytes(other)
	if _, err := s.Ingest(t.Context(), od, int64(len(other)), bytes.NewReader(other), nil); err != nil {
		t.Fatalf("ingest: %v", err)
	}
	if info, err := s.Stat(od); err != nil || info.Size != int64(len(other)) {
		t.Errorf("%+v, %v", info, err)
	}
}
