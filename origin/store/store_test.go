package store

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
)

func open(t *testing.T, cfg Config) *Store {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
	}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	<-s.Scanned()
	return s
}

// settled waits until what was evicted is removed.
func settled(s *Store) {
	for {
		s.mu.Lock()
		leaving, freed := s.leaving, s.freed.C()
		s.mu.Unlock()
		if leaving == 0 {
			return
		}
		<-freed
	}
}

// reopen closes a store and opens it again, as a restart does.
func reopen(t *testing.T, s *Store) *Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, s.cfg)
}

func noise(n int, seed byte) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

func ingest(t *testing.T, s *Store, b []byte, m *Marker) digest.Digest {
	t.Helper()
	d := digest.FromBytes(b)
	if _, err := s.Ingest(t.Context(), d, int64(len(b)), bytes.NewReader(b), m); err != nil {
		t.Fatal(err)
	}
	return d
}

// upload puts b into the store by a session of its own.
func upload(t *testing.T, s *Store, o UploadOptions, b []byte) digest.Digest {
	t.Helper()
	d := digest.FromBytes(b)
	o.Size = int64(len(b))
	u, err := s.NewUpload(o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Write(t.Context(), 0, bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Commit(t.Context(), d, nil); err != nil {
		t.Fatal(err)
	}
	return d
}

func content(t *testing.T, s *Store, d digest.Digest) []byte {
	t.Helper()
	r, err := s.Open(d)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r.File())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// files lists everything below a folder of the store.
func files(t *testing.T, s *Store, dir string) (out []string) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(s.cfg.Dir, dir), func(p string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			out = append(out, p)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func metainfoOf(t testing.TB, b []byte) *blob.Metainfo {
	t.Helper()
	h := blob.NewPieceHasher(int64(len(b)))
	if _, err := h.Write(b); err != nil {
		t.Fatal(err)
	}
	m, err := h.Sum(digest.FromBytes(b))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestIngestSurvivesARestart(t *testing.T) {
	s := open(t, Config{})
	b := noise(300_000, 1)
	d := ingest(t, s, b, nil)
	s = reopen(t, s)
	if got := content(t, s, d); !bytes.Equal(got, b) {
		t.Errorf("%d bytes came back, want %d", len(got), len(b))
	}
	m, err := s.Metainfo(d)
	if err != nil || m.InfoHash() != metainfoOf(t, b).InfoHash() {
		t.Errorf("metainfo of the same pass: %v, %v", m, err)
	}
}

func TestWrongBytesLeaveNothing(t *testing.T) {
	s := open(t, Config{})
	lie := digest.FromString("other")
	if _, err := s.Ingest(t.Context(), lie, -1, bytes.NewReader(noise(100_000, 2)), &Marker{Targets: []string{"b"}}); !errors.Is(err, ErrDigestMismatch) {
		t.Errorf("ingest: %v, want ErrDigestMismatch", err)
	}
	if left := append(files(t, s, "blobs"), files(t, s, "uploads")...); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if used, _ := s.Usage(); used != 0 {
		t.Errorf("%d bytes are counted as used", used)
	}
}

func TestUploadResumesAfterARestart(t *testing.T) {
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
		s := open(t, Config{})
		b := noise(200_000, 3)
		u, err := s.NewUpload(UploadOptions{Size: -1, Note: "demo/app"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := u.Write(t.Context(), 0, bytes.NewReader(b[:120_000])); err != nil {
			t.Fatal(err)
		}
		s = reopen(t, s)
		u, err = s.Upload(u.ID())
		if err != nil || u.Offset() != 120_000 || u.Note() != "demo/app" {
			t.Fatalf("session after the restart: %+v, %v", u, err)
		}
		var oe *OffsetError
		if _, err := u.Write(t.Context(), 5, strings.NewReader("x")); !errors.As(err, &oe) || oe.Want != 120_000 {
			t.Errorf("chunk at 5: %v, want an OffsetError at 120000", err)
		}
		if _, err := u.Write(t.Context(), -1, bytes.NewReader(b[120_000:])); err != nil {
			t.Fatal(err)
		}
		d := alg.FromBytes(b)
		if _, err := u.Commit(t.Context(), d, nil); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(content(t, s, d), b) {
			t.Errorf("%s: other bytes came back", alg)
		}
		if _, err := s.Upload(u.ID()); !errors.Is(err, ErrUploadUnknown) {
			t.Errorf("session after the commit: %v", err)
		}
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func TestBrokenChunkKeepsWhatCame(t *testing.T) {
	s := open(t, Config{})
	u, err := s.NewUpload(UploadOptions{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	cut := errors.New("connection lost")
	if _, err := u.Write(t.Context(), 0, io.MultiReader(strings.NewReader("hello "), failing{cut})); !errors.Is(err, cut) {
		t.Errorf("write: %v", err)
	}
	if u.Offset() != 6 {
		t.Errorf("offset %d, want 6", u.Offset())
	}
	if _, err := u.Write(t.Context(), 6, strings.NewReader("world")); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Commit(t.Context(), digest.FromString("hello world"), nil); err != nil {
		t.Error(err)
	}
}

func TestOneWriterAtATime(t *testing.T) {
	s := open(t, Config{})
	u, err := s.NewUpload(UploadOptions{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	started := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := u.Write(context.Background(), 0, io.MultiReader(signal{started}, r)); err != nil {
			t.Error(err)
		}
	})
	<-started
	if _, err := u.Write(t.Context(), -1, strings.NewReader("x")); !errors.Is(err, ErrBusy) {
		t.Errorf("second writer: %v, want ErrBusy", err)
	}
	w.Close()
	wg.Wait()
}

// signal closes its channel at the first read.
type signal struct{ c chan struct{} }

func (s signal) Read([]byte) (int, error) {
	close(s.c)
	return 0, io.EOF
}

func TestATransientUploadEndsWithTheProcess(t *testing.T) {
	s := open(t, Config{})
	b := noise(200_000, 3)
	d := digest.FromBytes(b)
	var ids []string
	for range 2 {
		u, err := s.NewUpload(UploadOptions{Size: int64(len(b)), Digest: d, Transient: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := u.Write(t.Context(), 0, bytes.NewReader(b[:120_000])); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, u.ID())
	}
	u, err := s.Upload(ids[1])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Write(t.Context(), 120_000, bytes.NewReader(b[120_000:])); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Commit(t.Context(), d, nil); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	if _, err := s.Upload(ids[0]); !errors.Is(err, ErrUploadUnknown) {
		t.Errorf("session after the restart: %v, want ErrUploadUnknown", err)
	}
	if left, err := os.ReadDir(filepath.Join(s.cfg.Dir, "uploads")); err != nil || len(left) > 0 {
		t.Errorf("left of the sessions: %v, %v", left, err)
	}
	if used, _ := s.Usage(); used != onDisk(t, s) {
		t.Errorf("%d bytes are counted as used, %d are", used, onDisk(t, s))
	}
	if !bytes.Equal(content(t, s, d), b) {
		t.Error("other bytes came back")
	}
	if m, err := s.Metainfo(d); err != nil || m.Size != int64(len(b)) {
		t.Errorf("metainfo: %v, %v", m, err)
	}
}

func TestUploadWithoutMetainfo(t *testing.T) {
	s := open(t, Config{})
	b := noise(10_000, 4)
	d := upload(t, s, UploadOptions{NoMetainfo: true}, b)
	if _, err := s.Metainfo(d); !errors.Is(err, ErrNotFound) {
		t.Errorf("metainfo: %v, want ErrNotFound", err)
	}
	if !bytes.Equal(content(t, s, d), b) {
		t.Error("other bytes came back")
	}
}

func TestExpireUploads(t *testing.T) {
	s := open(t, Config{})
	if _, err := s.NewUpload(UploadOptions{Size: -1}); err != nil {
		t.Fatal(err)
	}
	if n := s.ExpireUploads(time.Hour); n != 0 {
		t.Errorf("%d fresh sessions were removed", n)
	}
	if n := s.ExpireUploads(-2 * time.Second); n != 1 {
		t.Errorf("%d sessions were removed, want 1", n)
	}
	if left := files(t, s, "uploads"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestExpireUploadsSparesAWriter: a fetch may take longer than sessions may be idle, and its writer may wait for bytes.
func TestExpireUploadsSparesAWriter(t *testing.T) {
	s := open(t, Config{})
	b := noise(300_000, 5)
	u, err := s.NewUpload(UploadOptions{Size: int64(len(b))})
	if err != nil {
		t.Fatal(err)
	}
	pr, pw := io.Pipe()
	wrote := make(chan error, 1)
	go func() {
		_, err := u.Write(t.Context(), 0, pr)
		wrote <- err
	}()
	send := func(b []byte) {
		t.Helper()
		if _, err := pw.Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := pw.Write(nil); err != nil { // it waits for the next bytes: these were stored
			t.Fatal(err)
		}
	}
	send(b[:1000])
	u.touched.Store(0)
	expired := make(chan int, 1)
	go func() { expired <- s.ExpireUploads(time.Hour) }()
	select {
	case n := <-expired:
		if n != 0 {
			t.Errorf("%d sessions with a writer were removed", n)
		}
	case <-time.After(10 * time.Second):
		t.Error("waits for the writer")
	}
	send(b[1000:])
	if u.touched.Load() == 0 {
		t.Error("bytes came, and the session still counts as idle")
	}
	pw.Close()
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	if _, err := u.Commit(t.Context(), digest.FromBytes(b), nil); err != nil {
		t.Error(err)
	}
}

func TestMarkersAreTheQueue(t *testing.T) {
	s := open(t, Config{})
	d := ingest(t, s, noise(1000, 4), &Marker{Targets: []string{"b"}, Repositories: []string{"demo/a"}, Created: time.Unix(5, 0).UTC()})
	if err := s.Mark(d, Marker{Targets: []string{"c"}, Repositories: []string{"demo/b"}}); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	m, err := s.Marker(d)
	if err != nil || !slices.Equal(m.Targets, []string{"b", "c"}) || !slices.Equal(m.Repositories, []string{"demo/a", "demo/b"}) || m.Created.Unix() != 5 {
		t.Fatalf("marker %+v, %v", m, err)
	}
	if err := s.Delete(d); !errors.Is(err, ErrMarked) {
		t.Errorf("delete: %v, want ErrMarked", err)
	}
	stale := m
	stale.Repositories = []string{"demo/a"}
	for _, target := range m.Targets {
		if err := s.Unmark(d, stale, target); err != nil {
			t.Fatal(err)
		}
	}
	if len(s.Marked()) != 1 {
		t.Error("a push that came during write-back was forgotten")
	}
	for _, target := range m.Targets {
		if err := s.Unmark(d, m, target); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.Marked(); len(got) != 0 {
		t.Errorf("still marked: %v", got)
	}
	if err := s.Delete(d); err != nil {
		t.Error(err)
	}
}

// fill writes and verifies some pieces.
func fill(t *testing.T, p *Partial, b []byte, pieces ...int) {
	t.Helper()
	for _, i := range pieces {
		off := int64(i) * p.m.PieceLength()
		if _, err := p.WriteAt(b[off:off+p.m.PieceSize(i)], off); err != nil {
			t.Fatal(err)
		}
		if err := p.MarkVerified(i); err != nil {
			t.Fatal(err)
		}
	}
}

// A whole blob takes the place of an idle partial download of itself.
func TestUploadSupersedesAPartial(t *testing.T) {
	s := open(t, Config{})
	b := noise(600_000, 31)
	m := metainfoOf(t, b)
	p, err := s.Partial(m)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Ingest(t.Context(), m.Digest, int64(len(b)), bytes.NewReader(b), nil); !errors.Is(err, ErrBusy) {
		t.Errorf("while it is open: %v, want ErrBusy", err)
	}
	fill(t, p, b, 1)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	ingest(t, s, b, &Marker{Targets: []string{"b"}, Repositories: []string{"demo/a"}})
	s = reopen(t, s)
	if got := content(t, s, m.Digest); !bytes.Equal(got, b) {
		t.Error("the content is another")
	}
	if got := s.Marked(); len(got) != 1 {
		t.Errorf("marked: %v", got)
	}
	if got := files(t, s, "uploads"); len(got) != 0 {
		t.Errorf("left behind: %v", got)
	}
}

// TestUploadWithoutMetainfoSupersedesAPartial: the partial's metainfo came from somebody, and was never held against
// the bytes.
func TestUploadWithoutMetainfoSupersedesAPartial(t *testing.T) {
	s := open(t, Config{})
	b := noise(600_000, 32)
	m := metainfoOf(t, b)
	p, err := s.Partial(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	upload(t, s, UploadOptions{NoMetainfo: true}, b)
	if _, err := s.Metainfo(m.Digest); !errors.Is(err, ErrNotFound) {
		t.Errorf("metainfo: %v, want ErrNotFound", err)
	}
	if got := content(t, s, m.Digest); !bytes.Equal(got, b) {
		t.Error("the content is another")
	}
}

func TestManyCommitOneBlob(t *testing.T) {
	s := open(t, Config{})
	b := noise(1000, 32)
	d := digest.FromBytes(b)
	errs := make([]error, 8)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			m := &Marker{Targets: []string{"b"}, Repositories: []string{"demo/" + string(rune('a'+i))}}
			_, errs[i] = s.Ingest(t.Context(), d, -1, bytes.NewReader(b), m)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	if m, err := s.Marker(d); err != nil || len(m.Repositories) != len(errs) {
		t.Errorf("marker %+v, %v", m, err)
	}
	s = reopen(t, s)
	if got := content(t, s, d); !bytes.Equal(got, b) {
		t.Error("the content is another")
	}
	if got := files(t, s, "uploads"); len(got) != 0 {
		t.Errorf("left behind: %v", got)
	}
	want, err := s.footprint(d)
	if used, _ := s.Usage(); err != nil || used != want {
		t.Errorf("%d bytes in use, want %d, %v", used, want, err)
	}
}

// What is in a blob's folder after a crash between the steps of a commit.
func TestCrashDuringCommit(t *testing.T) {
	s := open(t, Config{})
	b, other := noise(1000, 33), noise(1000, 34)
	d := ingest(t, s, b, &Marker{Targets: []string{"b"}, Repositories: []string{"demo/a"}})
	if err := os.WriteFile(filepath.Join(s.cfg.Dir, blobFile(d, fileSession)), []byte("{}"), 0o644); err != nil {
		t.Fatal(err) // renamed, the session's file not yet removed
	}
	u, err := s.NewUpload(UploadOptions{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Write(t.Context(), 0, bytes.NewReader(other)); err != nil {
		t.Fatal(err)
	}
	if err := u.open(); err != nil { // as Commit does
		t.Fatal(err)
	}
	if err := u.stage(digest.FromBytes(other), int64(len(other)), &Marker{Targets: []string{"b"}}); err != nil {
		t.Fatal(err) // staged, not yet renamed
	}
	id := u.ID()
	s = reopen(t, s)
	if s.has(d, fileSession) {
		t.Error("the session's file stays in the blob's folder")
	}
	if u, err = s.Upload(id); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Commit(t.Context(), digest.FromBytes(other), nil); err != nil {
		t.Fatal(err)
	}
	if s.has(digest.FromBytes(other), fileMarker) {
		t.Error("a marker of the commit that failed came along")
	}
	if got := s.Marked(); !slices.Equal(got, []digest.Digest{d}) {
		t.Errorf("marked: %v", got)
	}
}

// A use that failed does not fail the next one, which may begin before the last reader of the first has gone.
func TestPartialAfterAFailure(t *testing.T) {
	s := open(t, Config{})
	b := noise(600_000, 12)
	m := metainfoOf(t, b)
	first, err := s.Partial(m)
	if err != nil {
		t.Fatal(err)
	}
	failed := errors.New("nobody reads it any more")
	first.Fail(failed)
	if err := first.Wait(t.Context(), 1); !errors.Is(err, failed) {
		t.Errorf("reader of the use that failed: %v", err)
	}
	second, err := s.Partial(m)
	if err != nil {
		t.Fatal(err)
	}
	late, cancel := context.WithCancel(t.Context())
	cancel()
	if err := second.Wait(late, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("the next use ended before its piece had come: %v", err)
	}
	fill(t, second, b, 1)
	if err := second.Wait(t.Context(), 1); err != nil {
		t.Errorf("reader of the next use: %v", err)
	}
	if err := errors.Join(first.Close(), second.Close()); err != nil {
		t.Error(err)
	}
}

// TestPartialCommitsWhileItsLastUseCloses: who abandoned a blob may still be syncing what it had when the next one has
// it all.
func TestPartialCommitsWhileItsLastUseCloses(t *testing.T) {
	s := open(t, Config{})
	for i := range 50 {
		b := noise(600_000, byte(100+i)) // five pieces
		m := metainfoOf(t, b)
		first, err := s.Partial(m)
		if err != nil {
			t.Fatal(err)
		}
		fill(t, first, b, 0, 1, 2, 3)
		closed := make(chan error, 1)
		go func() { closed <- first.Close() }()
		runtime.Gosched()
		last, err := s.Partial(m)
		if err != nil {
			t.Fatal(err)
		}
		fill(t, last, b, 4)
		if _, err := last.Commit(t.Context()); err != nil {
			t.Errorf("blob %d: %v", i, err)
		}
		if err := errors.Join(<-closed, last.Close()); err != nil {
			t.Errorf("blob %d: %v", i, err)
		}
	}
}

func TestPartialResumesAndCommits(t *testing.T) {
	s := open(t, Config{})
	b := noise(600_000, 11) // five pieces
	m := metainfoOf(t, b)
	p, err := s.Partial(m)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, p, b, 0, 3)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(m.Digest); !errors.Is(err, ErrNotFound) {
		t.Errorf("a partial blob is taken for a whole one: %v", err)
	}
	s = reopen(t, s)
	if p, err = s.Partial(m); err != nil {
		t.Fatal(err)
	}
	if got := p.Bitmap(); !got.Has(0) || !got.Has(3) || got.Count() != 2 {
		t.Errorf("pieces after the restart: %x", got.Bytes())
	}
	waited := make(chan error, 1)
	go func() { waited <- p.Wait(context.Background(), 4) }()
	if _, err := p.Commit(t.Context()); err == nil {
		t.Error("committed with pieces missing")
	}
	fill(t, p, b, 1, 2, 4)
	if err := <-waited; err != nil {
		t.Error(err)
	}
	if _, err := p.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 100)
	if _, err := p.ReadAt(got, 599_900); err != nil || !bytes.Equal(got, b[599_900:]) {
		t.Errorf("reader of the partial blob after the commit: %v", err)
	}
	p.Close()
	s = reopen(t, s)
	if !bytes.Equal(content(t, s, m.Digest), b) {
		t.Error("other bytes came back")
	}
	if used, _ := s.Usage(); used != onDisk(t, s) {
		t.Errorf("%d bytes are counted, %d are on the disk", used, onDisk(t, s))
	}
}

// TestCrashKeepsVerifiedPieces copies the directory while pieces are there and nothing was closed, as kill -9 leaves
// it.
func TestCrashKeepsVerifiedPieces(t *testing.T) {
	s := open(t, Config{})
	b := noise(600_000, 12)
	p, err := s.Partial(metainfoOf(t, b))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	fill(t, p, b, 1, 4)
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(s.cfg.Dir)); err != nil {
		t.Fatal(err)
	}
	after := open(t, Config{Dir: dir})
	q, err := after.Partial(p.m)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	if got := q.Bitmap(); !got.Has(1) || !got.Has(4) || got.Count() != 2 {
		t.Errorf("pieces after the crash: %x", got.Bytes())
	}
}

func TestPiecesFileAfterAReboot(t *testing.T) {
	synced, have := blob.NewBitmap(11), blob.NewBitmap(11)
	synced.Set(2)
	have.Set(2)
	have.Set(7)
	b := encodePieces(bootID(), synced, have)
	if _, got := decodePieces(bootID(), 11, b); got.Count() != 2 {
		t.Errorf("the same boot trusts %d pieces, want 2", got.Count())
	}
	copy(b[len(piecesMagic):], "00000000-0000-0000-0000-000000000000")
	if _, got := decodePieces(bootID(), 11, b); !got.Has(2) || got.Count() != 1 {
		t.Errorf("after a reboot %x is trusted, want the synced piece alone", got.Bytes())
	}
	for _, bad := range [][]byte{nil, b[:len(b)-1], append([]byte("x"), b...)} {
		if _, got := decodePieces(bootID(), 11, bad); got.Count() != 0 {
			t.Errorf("%q is trusted", bad)
		}
	}
}

func TestWrongMetainfoIsFoundAtCommit(t *testing.T) {
	s := open(t, Config{})
	b := noise(300_000, 13)
	h := blob.NewPieceHasher(int64(len(b)))
	if _, err := h.Write(b); err != nil {
		t.Fatal(err)
	}
	m, err := h.Sum(digest.FromString("not these bytes"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.Partial(m)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, p, b, 0, 1, 2)
	if _, err := p.Commit(t.Context()); !errors.Is(err, ErrDigestMismatch) {
		t.Errorf("commit: %v, want ErrDigestMismatch", err)
	}
	p.Close()
	if left := files(t, s, "blobs"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestFailWakesReaders(t *testing.T) {
	s := open(t, Config{})
	p, err := s.Partial(metainfoOf(t, noise(300_000, 14)))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	lost := errors.New("swarm is gone")
	p.Fail(lost)
	if err := p.Wait(t.Context(), 0); !errors.Is(err, lost) {
		t.Errorf("wait: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	s := open(t, Config{})
	if _, err := Open(s.cfg); !errors.Is(err, ErrLocked) {
		t.Errorf("second process: %v, want ErrLocked", err)
	}
	if _, err := s.NewUpload(UploadOptions{ID: "../escape"}); err == nil {
		t.Error("an id with a path was taken")
	}
	if err := s.PutName("../escape", nil); err == nil {
		t.Error("a key with a path was taken")
	}
	s.Close()
	if err := os.WriteFile(filepath.Join(s.cfg.Dir, "format"), []byte("kraken-store 99\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(s.cfg); !errors.Is(err, ErrNewerFormat) || !strings.Contains(err.Error(), "99") || !strings.Contains(err.Error(), s.cfg.Dir) {
		t.Errorf("newer format: %v, want ErrNewerFormat with the version and the directory", err)
	}
}

func TestNames(t *testing.T) {
	s := open(t, Config{})
	if err := s.PutName("ab12", []byte("one")); err != nil {
		t.Fatal(err)
	}
	if err := s.PutName("ab12", []byte("two")); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	if b, err := s.Name("ab12"); err != nil || string(b) != "two" {
		t.Errorf("record %q, %v", b, err)
	}
	if err := s.DeleteName("ab12"); err != nil {
		t.Fatal(err)
	}
	if keys := s.Names(); len(keys) != 0 || s.NumNames() != 0 {
		t.Errorf("keys %v", keys)
	}
}

func FuzzDecodePieces(f *testing.F) {
	f.Add(20, encodePieces(bootID(), blob.NewBitmap(20), blob.NewBitmap(20)))
	f.Fuzz(func(t *testing.T, n int, b []byte) {
		if n < 0 || n > 1<<16 {
			return
		}
		if _, got := decodePieces(bootID(), n, b); got.Len() != n {
			t.Errorf("%d pieces, want %d", got.Len(), n)
		}
	})
}

// TestFilesAreTheOwnersAlone: whoever else is on the machine reads no blob, session or record.
func TestFilesAreTheOwnersAlone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deeper", "store")
	s := open(t, Config{Dir: dir})
	ingest(t, s, noise(100_000, 1), &Marker{})
	u, err := s.NewUpload(UploadOptions{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Write(t.Context(), 0, bytes.NewReader(noise(1000, 2))); err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(filepath.Dir(dir), func(p string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err == nil && fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s is %s", p, fi.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
