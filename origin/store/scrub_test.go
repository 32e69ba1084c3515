package store

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
)

// rot replaces the bytes of a blob by others, as a disk does.
func rot(t *testing.T, s *Store, d digest.Digest, n int) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.cfg.Dir, blobFile(d, fileData)), noise(n, 99), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestScrub(t *testing.T) {
	var gone, rotten []digest.Digest
	s := open(t, Config{
		OnEvict:  func(d digest.Digest) { gone = append(gone, d) },
		OnRotten: func(d digest.Digest) { rotten = append(rotten, d) },
	})
	const n = 3<<20 + 1 // more than one read, and no whole block
	good, bad, owed, short := ingest(t, s, noise(n, 15), nil), ingest(t, s, noise(n, 16), nil),
		ingest(t, s, noise(n, 17), &Marker{Targets: []string{"b"}}), ingest(t, s, noise(n, 18), nil)
	rot(t, s, bad, n)
	rot(t, s, owed, n)
	rot(t, s, short, n-1)
	accessed := s.entries[good].access
	if err := s.Scrub(t.Context(), good); err != nil {
		t.Error(err)
	}
	if s.entries[good].access != accessed {
		t.Error("verifying counted as an access")
	}
	for _, d := range []digest.Digest{bad, short} {
		if err := s.Scrub(t.Context(), d); !errors.Is(err, ErrDigestMismatch) {
			t.Errorf("rotten blob: %v, want ErrDigestMismatch", err)
		}
		if there(s, d) {
			t.Error("the rotten blob is still there")
		}
	}
	if err := s.Scrub(t.Context(), owed); !errors.Is(err, ErrDigestMismatch) {
		t.Errorf("rotten blob that the bucket lacks: %v, want ErrDigestMismatch", err)
	}
	if size, lost := s.Lost(owed); !lost || size != n {
		t.Errorf("its debt is %d bytes, %t, want it kept", size, lost)
	}
	if !there(s, good) || there(s, owed) {
		t.Error("the good blob is gone, or a rotten one is still there")
	}
	if want := []digest.Digest{bad, short, owed}; !slices.Equal(gone, want) || !slices.Equal(rotten, want) {
		t.Errorf("told of %v and %v, want of those that were removed", gone, rotten)
	}
	if used, _ := s.Usage(); used != onDisk(t, s) {
		t.Errorf("%d bytes are counted, %d are on the disk", used, onDisk(t, s))
	}
}

// TestScrubOfManySmallBlobs: they are read at a pace of blobs, since opening each is what costs, and in memory that is
// made once.
func TestScrubOfManySmallBlobs(t *testing.T) {
	const n = 100
	s := open(t, Config{Volatile: true})
	for i := range byte(n) {
		ingest(t, s, noise(10, i), nil)
	}
	const perSecond = 1000
	limit := rate.NewLimiter(perSecond*scrubLeast, scrubChunk)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	began := time.Now()
	if err := s.scrubAll(t.Context(), limit); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	runtime.ReadMemStats(&after)
	if blobs := s.scrub.blobs.Load(); blobs != n {
		t.Errorf("%d of %d blobs were verified", blobs, n)
	}
	if least := (n - scrubChunk/scrubLeast) * time.Second / perSecond; took < least {
		t.Errorf("%d blobs were read in %s, want %s at least", n, took, least)
	}
	// Others of this process allocate, too: what is wrong is a buffer for each blob.
	if made := after.TotalAlloc - before.TotalAlloc; made > n/4*scrubChunk {
		t.Errorf("%d bytes were allocated for %d blobs of 10, want one buffer of %d", made, n, scrubChunk)
	}
}

// TestScrubReadsToTheEnd: of whatever size, a blob is read whole, and one that has grown is no longer the same.
func TestScrubReadsToTheEnd(t *testing.T) {
	for _, n := range []int{0, 1, scrubAlign - 1, scrubAlign, scrubAlign + 1, scrubChunk - 1, scrubChunk, scrubChunk + 1} {
		s := open(t, Config{Volatile: true})
		d := ingest(t, s, noise(n, 7), nil)
		if err := s.Scrub(t.Context(), d); err != nil {
			t.Errorf("%d bytes: %v", n, err)
		}
		f, err := os.OpenFile(filepath.Join(s.cfg.Dir, blobFile(d, fileData)), os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write([]byte{1}); err != nil {
			t.Error(err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if err := s.Scrub(t.Context(), d); !errors.Is(err, ErrDigestMismatch) {
			t.Errorf("%d bytes and one more: %v, want ErrDigestMismatch", n, err)
		}
	}
}

func TestScrubInTheBackground(t *testing.T) {
	// Off: only the pass that is asked for.
	s := open(t, Config{Keep: Keep{Scrub: ScrubConfig{Off: true, Rate: 8 << 20}}})
	for i := range byte(4) {
		ingest(t, s, noise(1<<20, i), nil)
	}
	bad := ingest(t, s, noise(1000, 50), nil)
	rot(t, s, bad, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	began := time.Now()
	go func() { done <- s.RunScrub(ctx) }()
	s.ScrubNow()
	for s.scrub.passes.Load() == 0 {
		if time.Since(began) > 20*time.Second {
			t.Fatal("no pass in 20 s")
		}
		time.Sleep(time.Millisecond)
	}
	// 4 MiB at 8 MiB/s, less the burst of 1 MiB.
	if took := time.Since(began); took < 350*time.Millisecond {
		t.Errorf("4 MiB at 8 MiB/s were read in %s", took)
	}
	if there(s, bad) {
		t.Error("the rotten blob is still there")
	}
	if blobs, rotten := s.scrub.blobs.Load(), s.scrub.rotten.Load(); blobs != 5 || rotten != 1 {
		t.Errorf("counted %d verified and %d rotten, want 5 and 1", blobs, rotten)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestPushReplacesRot: the verified bytes of a push take the place of a file that has rotted; what it owed and what the
// push owes are both owed.
func TestPushReplacesRot(t *testing.T) {
	for name, n := range map[string]int{"a bit": 300_000, "short": 299_999, "long": 300_001} {
		t.Run(name, func(t *testing.T) {
			var gone []digest.Digest
			s := open(t, Config{OnEvict: func(d digest.Digest) { gone = append(gone, d) }})
			content := noise(300_000, 40)
			d := ingest(t, s, content, &Marker{Targets: []string{"a"}, Repositories: []string{"one"}})
			push := func(m *Marker) {
				t.Helper()
				u, err := s.NewUpload(UploadOptions{Size: SizeUnknown})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := u.Write(t.Context(), 0, bytes.NewReader(content)); err != nil {
					t.Fatal(err)
				}
				if _, err := u.Commit(t.Context(), d, m); err != nil {
					t.Fatal(err)
				}
			}
			push(nil)
			if len(gone) > 0 || s.scrub.rotten.Load() != 0 {
				t.Fatal("a good blob counts as rotten")
			}
			rot(t, s, d, n)
			push(nil)
			if m, err := s.Marker(d); err != nil || !slices.Equal(m.Targets, []string{"a"}) {
				t.Errorf("what the old file owed: %+v, %v", m, err)
			}
			rot(t, s, d, n)
			push(&Marker{Targets: []string{"b"}, Repositories: []string{"two"}})
			m, err := s.Marker(d)
			if err != nil || !slices.Equal(m.Targets, []string{"a", "b"}) || !slices.Equal(m.Repositories, []string{"one", "two"}) {
				t.Errorf("what both owe: %+v, %v", m, err)
			}
			if err := s.Scrub(t.Context(), d); err != nil {
				t.Errorf("what was pushed is not there: %v", err)
			}
			if s.scrub.rotten.Load() != 2 || len(gone) != 2 {
				t.Errorf("%d counted, told of %d, want 2", s.scrub.rotten.Load(), len(gone))
			}
			if used, _ := s.Usage(); used != onDisk(t, s) {
				t.Errorf("%d bytes are counted, %d are on the disk", used, onDisk(t, s))
			}
			s = reopen(t, s)
			<-s.Scanned()
			if err := s.Scrub(t.Context(), d); err != nil {
				t.Errorf("after a restart: %v", err)
			}
		})
	}
}

func TestOpenVerified(t *testing.T) {
	s := open(t, Config{})
	good, bad, owed := ingest(t, s, noise(5000, 41), nil), ingest(t, s, noise(5000, 42), nil), ingest(t, s, noise(5000, 43), &Marker{Targets: []string{"b"}})
	rot(t, s, bad, 5000)
	rot(t, s, owed, 5000)
	r, err := s.OpenVerified(t.Context(), good)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r.File()); err != nil || !bytes.Equal(b, noise(5000, 41)) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	r.Close()
	for _, d := range []digest.Digest{bad, owed} {
		if _, err := s.OpenVerified(t.Context(), d); !errors.Is(err, ErrNotFound) {
			t.Errorf("a rotten one: %v, want ErrNotFound", err)
		}
	}
	if _, lost := s.Lost(owed); !lost {
		t.Error("what the rotten one owes is not owed any more")
	}
}
