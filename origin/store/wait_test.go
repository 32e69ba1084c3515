package store

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
)

// heldDisk is a disk that neither syncs nor removes until it is told to.
type heldDisk struct {
	waiting chan string   // what waits, as it comes
	on      chan struct{} // closed: go on
}

func slowDisk(s *Store) *heldDisk {
	w := &heldDisk{make(chan string, 1000), make(chan struct{})}
	removeAll, fsync := s.removeAll, s.fsync
	s.removeAll = func(name string) error {
		w.waiting <- name
		<-w.on
		return removeAll(name)
	}
	s.fsync = func(f *os.File) error {
		w.waiting <- f.Name()
		<-w.on
		return fsync(f)
	}
	return w
}

// answers makes every call that reads, and fails when one waits.
func answers(t *testing.T, s *Store, d digest.Digest) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		r, err := s.Open(d)
		if err != nil {
			t.Error(err)
			return
		}
		r.Close()
		if _, err := s.Stat(d); err != nil {
			t.Error(err)
		}
		s.Usage()
		s.Marked()
		s.Debts()
		s.NumNames()
		s.Recent(time.Time{}, 10, func(Info) bool { return true })
		s.status()
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("a read waits for the disk")
	}
}

// What waits for the disk keeps nobody else waiting, whatever it is.
func TestNoReadWaitsForTheDisk(t *testing.T) {
	for name, begin := range map[string]func(s *Store, other digest.Digest) error{
		"delete":  func(s *Store, other digest.Digest) error { return s.Delete(other) },
		"mark":    func(s *Store, other digest.Digest) error { return s.Mark(other, Marker{Targets: []string{"b"}}) },
		"pin":     func(s *Store, other digest.Digest) error { return s.Pin(other) },
		"record":  func(s *Store, _ digest.Digest) error { return s.PutName("key", []byte("v")) },
		"partial": func(s *Store, _ digest.Digest) error { return openAndClose(s) },
		"commit": func(s *Store, _ digest.Digest) error {
			b := noise(5000, 9)
			_, err := s.Ingest(s.ctx, digest.FromBytes(b), -1, bytes.NewReader(b), &Marker{Targets: []string{"b"}})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, Config{})
			d, other := ingest(t, s, noise(3000, 1), nil), ingest(t, s, noise(3000, 2), nil)
			w := slowDisk(s)
			done := make(chan error, 1)
			go func() { done <- begin(s, other) }()
			<-w.waiting
			answers(t, s, d)
			close(w.on)
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

func openAndClose(s *Store) error {
	b := noise(300_000, 7)
	h := blob.NewPieceHasher(int64(len(b)))
	if _, err := h.Write(b); err != nil {
		return err
	}
	m, err := h.Sum(digest.FromBytes(b))
	if err != nil {
		return err
	}
	p, err := s.Partial(m)
	if err != nil {
		return err
	}
	return p.Close()
}

// At the high water mark many blobs are evicted at once: nobody waits for their removal but who can't do without the
// space.
func TestNoReadWaitsForAnEviction(t *testing.T) {
	var mu sync.Mutex
	var gone []digest.Digest
	s := open(t, Config{Capacity: 4 << 20, Keep: Keep{HighWater: 0.5, LowWater: 0.2}, OnEvict: func(d digest.Digest) {
		mu.Lock()
		defer mu.Unlock()
		gone = append(gone, d)
	}})
	var in []digest.Digest
	for i := range byte(40) {
		in = append(in, upload(t, s, UploadOptions{Transient: true, NoMetainfo: true}, noise(40_000, i)))
	}
	w := slowDisk(s)
	s.fsync = s.root.Sync
	// crosses the mark; does not wait
	last := upload(t, s, UploadOptions{Transient: true, NoMetainfo: true}, noise(500_000, 100))
	<-w.waiting
	mu.Lock()
	evicted := slices.Clone(gone)
	mu.Unlock()
	if len(evicted) < 20 || there(s, evicted[0]) || there(s, evicted[len(evicted)-1]) {
		t.Errorf("%d were evicted, and some are still found", len(evicted))
	}
	answers(t, s, last)
	answers(t, s, in[39])
	// One of them is wanted again: it waits for its own folder only, and is right.
	again := make(chan error, 1)
	b := noise(40_000, byte(slices.Index(in, evicted[0])))
	go func() {
		_, err := s.Ingest(s.ctx, evicted[0], int64(len(b)), bytes.NewReader(b), nil)
		again <- err
	}()
	answers(t, s, last)
	close(w.on)
	if err := <-again; err != nil {
		t.Fatal(err)
	}
	if got := content(t, s, evicted[0]); !bytes.Equal(got, b) {
		t.Error("what was taken in again while it was removed is wrong")
	}
	settled(s)
	if used, _ := s.Usage(); used != onDisk(t, s) {
		t.Errorf("%d bytes are counted, %d are on the disk", used, onDisk(t, s))
	}
}

// Who needs the very space of what is being removed waits for it, and then gets it.
func TestFullStoreWaitsForWhatLeaves(t *testing.T) {
	s := open(t, Config{Capacity: 1 << 20, Keep: Keep{HighWater: 1, LowWater: 1}})
	upload(t, s, UploadOptions{Transient: true, NoMetainfo: true}, noise(600_000, 1))
	w := slowDisk(s)
	s.fsync = s.root.Sync
	b := noise(600_000, 2)
	done := make(chan error, 1)
	go func() {
		_, err := s.Ingest(s.ctx, digest.FromBytes(b), int64(len(b)), bytes.NewReader(b), nil)
		done <- err
	}()
	<-w.waiting
	select {
	case err := <-done:
		t.Fatalf("taken while there was no space for it: %v", err)
	default:
	}
	close(w.on)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Ingests, reads, deletes and evictions of the same few blobs at once leave each whole or not there.
func TestEvictedAndTakenInAtOnce(t *testing.T) {
	s := open(t, Config{Capacity: 300_000, Keep: Keep{HighWater: 0.6, LowWater: 0.3}})
	blobs := make([][]byte, 6)
	for i := range blobs {
		blobs[i] = noise(30_000, byte(i))
	}
	var wg sync.WaitGroup
	for g := range 6 {
		wg.Go(func() {
			for i := range 60 {
				b := blobs[(g+i*5)%len(blobs)]
				d := digest.FromBytes(b)
				if _, err := s.Ingest(t.Context(), d, int64(len(b)), bytes.NewReader(b), nil); err != nil && !errors.Is(err, ErrFull) {
					t.Error(err)
				}
				r, err := s.Open(d)
				if err == nil {
					got := make([]byte, len(b))
					if _, err := r.File().ReadAt(got, 0); err != nil || !bytes.Equal(got, b) {
						t.Errorf("other bytes, %v", err)
					}
					r.Close()
				} else if !errors.Is(err, ErrNotFound) {
					t.Error(err)
				}
				if i%7 == 0 {
					if err := s.Delete(d); err != nil && !errors.Is(err, ErrNotFound) {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	settled(s)
	if n := s.lost.Load(); n > 0 {
		t.Errorf("%d blobs were taken for removed by somebody else", n)
	}
	if used, _ := s.Usage(); used != onDisk(t, s) {
		t.Errorf("%d bytes are counted, %d are on the disk", used, onDisk(t, s))
	}
}

// An idle reader that would let go does not keep a blob; one that doesn't say so does.
func TestYieldingReadersGiveRoom(t *testing.T) {
	var readers sync.Map
	s := open(t, Config{Capacity: 1 << 20, OnEvict: func(d digest.Digest) {
		if r, ok := readers.LoadAndDelete(d); ok {
			r.(*Reader).Close()
		}
	}})
	b := noise(600_000, 1)
	d := ingest(t, s, b, nil)
	r, err := s.OpenYielding(d)
	if err != nil {
		t.Fatal(err)
	}
	readers.Store(d, r)
	next := ingest(t, s, noise(600_000, 2), nil)
	if there(s, d) || !there(s, next) {
		t.Error("the idle one is there still")
	}
	held, err := s.Open(next)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if _, err := s.Ingest(t.Context(), d, int64(len(b)), bytes.NewReader(b), nil); !errors.Is(err, ErrFull) {
		t.Errorf("%v, want ErrFull: the other one is being read", err)
	}
}

// A blob whose file was removed or shortened by somebody else is not there; it can be taken in again.
func TestFileIsNotWhatWasCommitted(t *testing.T) {
	for name, harm := range map[string]func(folder string) error{
		"folder removed": os.RemoveAll,
		"file removed":   func(f string) error { return os.Remove(filepath.Join(f, fileData)) },
		"shortened":      func(f string) error { return os.Truncate(filepath.Join(f, fileData), 1000) },
		"lengthened":     func(f string) error { return os.Truncate(filepath.Join(f, fileData), 1<<20) },
	} {
		for _, when := range []string{"opened", "opened yielding", "scanned"} {
			if when == "scanned" && name == "folder removed" {
				continue // nothing is left to tell
			}
			t.Run(name+", "+when, func(t *testing.T) {
				gone := make(chan digest.Digest, 1)
				s := open(t, Config{OnEvict: func(d digest.Digest) { gone <- d }})
				b := noise(3000, 1)
				d := ingest(t, s, b, &Marker{Targets: []string{"b"}})
				if err := harm(filepath.Join(s.cfg.Dir, blobDir(d))); err != nil {
					t.Fatal(err)
				}
				var err error
				switch when {
				case "opened":
					_, err = s.Open(d)
				case "opened yielding":
					_, err = s.OpenYielding(d)
				default:
					s = reopen(t, s)
					_, err = s.Stat(d)
				}
				if !errors.Is(err, ErrNotFound) || there(s, d) || s.lost.Load() != 1 {
					t.Errorf("%v, there: %v, lost: %d, want ErrNotFound", err, there(s, d), s.lost.Load())
				}
				if when != "scanned" {
					if got := <-gone; got != d {
						t.Errorf("OnEvict was told of %s", got)
					}
				}
				s = reopen(t, s)
				if m, err := s.Marker(d); err != nil || !slices.Equal(m.Targets, []string{"b"}) || !slices.Equal(s.Marked(), []digest.Digest{d}) {
					t.Errorf("what is owed: %+v, %v, marked %v", m, err, s.Marked())
				}
				if n, _ := s.Debts(); n != 1 || s.NumLost() != 1 {
					t.Errorf("%d debts, %d lost", n, s.NumLost())
				}
				if err := s.Delete(d); !errors.Is(err, ErrNotFound) {
					t.Errorf("delete: %v", err)
				}
				ingest(t, s, b, nil)
				if n, _ := s.Debts(); n != 1 || s.NumLost() != 0 || len(s.Marked()) != 1 {
					t.Errorf("with its bytes again: %d debts, %d lost, marked %v", n, s.NumLost(), s.Marked())
				}
				if err := s.Delete(d); !errors.Is(err, ErrMarked) {
					t.Errorf("delete: %v", err)
				}
				if got := content(t, s, d); !bytes.Equal(got, b) {
					t.Error("what was taken in again is wrong")
				}
				if used, _ := s.Usage(); used != onDisk(t, s) {
					t.Errorf("%d bytes are counted, %d are on the disk", used, onDisk(t, s))
				}
			})
		}
	}
}

func TestMetainfoLength(t *testing.T) {
	m := metainfoOf(t, noise(300_000, 1))
	if n, ok := metainfoLength(m.Marshal()[:64]); !ok || n != 300_000 {
		t.Errorf("%d, %v", n, ok)
	}
	for _, s := range []string{"", "d4:infod6:lengthi", "d4:infod6:lengthi12", "d4:infod6:lengthixe4:name", strings.Repeat("\x00", 64)} {
		if n, ok := metainfoLength([]byte(s)); ok {
			t.Errorf("%q says %d", s, n)
		}
	}
}

// unscanned opens a store whose scan has found nothing yet and goes on only when the test says so.
func unscanned(t *testing.T, cfg Config) (s *Store, goOn func()) {
	t.Helper()
	hold := make(chan struct{})
	cfg.beforeScan = func() { <-hold }
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	release := sync.OnceFunc(func() { close(hold) })
	t.Cleanup(release)
	return s, func() {
		release()
		<-s.Scanned()
	}
}

// Before the scan has come to a blob it is found, changed, deleted and taken in as after it, and counted once.
func TestLookupsDuringTheScan(t *testing.T) {
	s := open(t, Config{})
	var in []digest.Digest
	for i := range byte(8) {
		in = append(in, ingest(t, s, noise(3000, i), nil))
	}
	marked := ingest(t, s, noise(3000, 50), &Marker{Targets: []string{"b"}, Repositories: []string{"r"}})
	half := noise(600_000, 60)
	m := metainfoOf(t, half)
	p, err := s.Partial(m)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, p, half, 0, 1)
	if err := errors.Join(p.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	s, goOn := unscanned(t, s.cfg)
	if !s.Scanning() || len(s.Marked()) != 0 {
		t.Fatal("the scan is over already")
	}
	answers(t, s, in[0])
	if _, err := s.Stat(digest.FromString("absent")); !errors.Is(err, ErrNotFound) {
		t.Errorf("absent: %v", err)
	}
	if _, err := s.Stat("sha256:no digest"); !errors.Is(err, ErrNotFound) {
		t.Errorf("no digest: %v", err)
	}
	if mk, err := s.Marker(marked); err != nil || !slices.Equal(mk.Repositories, []string{"r"}) {
		t.Errorf("%+v, %v", mk, err)
	}
	if err := s.Delete(marked); !errors.Is(err, ErrMarked) {
		t.Errorf("delete what is owed: %v, want ErrMarked", err)
	}
	if err := s.Delete(in[1]); err != nil {
		t.Error(err)
	}
	ingest(t, s, noise(3000, 2), nil) // is there
	ingest(t, s, noise(3000, 70), nil)
	if err := s.Mark(in[3], Marker{Targets: []string{"b"}}); err != nil {
		t.Error(err)
	}
	if p, err = s.Partial(m); err != nil || !p.Has(0) || p.Has(2) {
		t.Fatalf("resumed with %v, %v", p, err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	goOn()
	if there(s, in[1]) || len(s.Marked()) != 2 {
		t.Errorf("deleted one there: %v, marked %v", there(s, in[1]), s.Marked())
	}
	used, _ := s.Usage()
	s = reopen(t, s)
	if want, _ := s.Usage(); used != want {
		t.Errorf("%d bytes are counted, %d by a scan that nobody interfered with", used, want)
	}
}

// Nothing is evicted by half an account: who needs space waits for the scan, who has it does not.
func TestEvictionWaitsForTheScan(t *testing.T) {
	s := open(t, Config{Capacity: 1 << 20})
	old := ingest(t, s, noise(500_000, 1), nil)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	cfg := s.cfg
	cfg.MinFree = 1
	s, goOn := unscanned(t, cfg)
	free := int64(1 << 30)
	var mu sync.Mutex
	s.avail = func() (int64, error) {
		mu.Lock()
		defer mu.Unlock()
		return free, nil
	}
	ingest(t, s, noise(300_000, 2), nil)
	mu.Lock()
	free = 0
	mu.Unlock()
	done := make(chan error, 1)
	go func() {
		b := noise(400_000, 3)
		_, err := s.Ingest(s.ctx, digest.FromBytes(b), int64(len(b)), bytes.NewReader(b), nil)
		done <- err
	}()
	if !there(s, old) {
		t.Error("evicted before all is known")
	}
	select {
	case err := <-done:
		t.Errorf("did not wait: %v", err)
	default:
	}
	mu.Lock()
	free = 1 << 30
	mu.Unlock()
	goOn()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if there(s, old) {
		t.Error("over the capacity, and the oldest is there")
	}
}

// A torn blob of before a crash is dropped whenever it is met; one that is taken in during the scan is not one.
func TestScanTellsTornFromFresh(t *testing.T) {
	s := open(t, Config{Volatile: true})
	torn := ingest(t, s, noise(3000, 1), nil)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.cfg.Dir, fileSynced), fmt.Appendf(nil, "another-boot %d\n", time.Now().Add(-time.Hour).UnixNano()), 0o644); err != nil {
		t.Fatal(err)
	}
	s, goOn := unscanned(t, s.cfg)
	fresh := ingest(t, s, noise(3000, 2), nil)
	if there(s, torn) {
		t.Error("a torn blob was found")
	}
	if err := s.syncAll(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(s.cfg.Dir, fileSynced)); err != nil || !strings.HasPrefix(string(b), "another-boot") {
		t.Errorf("said to be synced before all was looked at: %q, %v", b, err)
	}
	goOn()
	if !there(s, fresh) {
		t.Error("what was taken in during the scan was taken for torn")
	}
}
