package store

import (
	"bytes"
	"errors"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// onDisk is what du says of the folders of all blobs.
func onDisk(t *testing.T, s *Store) (n int64) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(s.cfg.Dir, "blobs"), func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(s.cfg.Dir, p)
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if depth := strings.Count(rel, "/"); err == nil && depth >= 3 { // blobs/sha256/ab/<hex>
			n += fi.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func there(s *Store, d digest.Digest) bool {
	_, err := s.Stat(d)
	return err == nil
}

func TestEvictionSparesWhatIsInUse(t *testing.T) {
	var gone []digest.Digest
	s := open(t, Config{Capacity: 1 << 20, OnEvict: func(d digest.Digest) { gone = append(gone, d) }})
	const size = 200_000
	old := ingest(t, s, noise(size, 5), nil)
	marked := ingest(t, s, noise(size, 6), &Marker{Targets: []string{"b"}})
	pinned := ingest(t, s, noise(size, 7), nil)
	if err := s.Pin(pinned); err != nil {
		t.Fatal(err)
	}
	held := ingest(t, s, noise(size, 8), nil)
	r, err := s.Open(held)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ingest(t, s, noise(size, 9), nil)
	if !slices.Equal(gone, []digest.Digest{old}) {
		t.Errorf("evicted %v, want the idle one %s", gone, old)
	}
	for _, d := range []digest.Digest{marked, pinned, held} {
		if !there(s, d) {
			t.Errorf("%s is gone", d)
		}
	}
	big := noise(900_000, 10)
	if _, err := s.Ingest(t.Context(), digest.FromBytes(big), int64(len(big)), bytes.NewReader(big), nil); !errors.Is(err, ErrFull) {
		t.Errorf("more than fits: %v, want ErrFull", err)
	}
	settled(s)
	if used, _ := s.Usage(); used > 1<<20 || used != onDisk(t, s) {
		t.Errorf("%d bytes are counted, %d are on the disk", used, onDisk(t, s))
	}
}

func TestWhatIsCountedIsWhatTheDiskGave(t *testing.T) {
	s := open(t, Config{})
	same := func(when string) {
		t.Helper()
		if used, _ := s.Usage(); used != onDisk(t, s) {
			t.Errorf("%s: %d bytes are counted, %d are on the disk", when, used, onDisk(t, s))
		}
	}
	d := ingest(t, s, noise(1, 1), nil) // one byte, which takes a block, a folder and a metainfo
	ingest(t, s, noise(300_000, 2), nil)
	same("after two blobs")
	upload(t, s, UploadOptions{Transient: true, NoMetainfo: true}, noise(5000, 3))
	same("after a small one")
	if err := s.Mark(d, Marker{Targets: []string{"b"}, Repositories: []string{"a"}}); err != nil {
		t.Fatal(err)
	}
	same("with a marker")
	if err := s.DropMetainfo(d); err != nil {
		t.Fatal(err)
	}
	same("without metainfo")
	if _, err := s.ComputeMetainfo(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if err := s.Unmark(d, Marker{Repositories: []string{"a"}}, "b"); err != nil {
		t.Fatal(err)
	}
	same("written back")
	s = reopen(t, s)
	same("after a restart")
	if err := s.Delete(d); err != nil {
		t.Fatal(err)
	}
	same("after a delete")
}

func TestPushOverAPartialBlobCountsOnce(t *testing.T) {
	s := open(t, Config{})
	b := noise(600_000, 3)
	m := metainfoOf(t, b)
	p, err := s.Partial(m)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, p, b, 0, 1)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	ingest(t, s, b, nil)
	if used, _ := s.Usage(); used != onDisk(t, s) {
		t.Errorf("%d bytes are counted, %d are on the disk", used, onDisk(t, s))
	}
}

func TestWaterMarks(t *testing.T) {
	var gone []digest.Digest
	s := open(t, Config{Capacity: 4 << 20, Keep: Keep{HighWater: 0.75, LowWater: 0.5}, OnEvict: func(d digest.Digest) { gone = append(gone, d) }})
	var in []digest.Digest
	for i := range byte(7) { // of 400,000 bytes and a little: seven are below 3 MiB, eight above
		in = append(in, ingest(t, s, noise(400_000, i), nil))
	}
	if len(gone) > 0 {
		t.Fatalf("below the high mark %d were evicted", len(gone))
	}
	s.Touch(in[0]) // the first is the last used now
	ingest(t, s, noise(400_000, 100), nil)
	if want := in[1:4]; !slices.Equal(gone, want) {
		t.Errorf("evicted %v, want down to the low mark the least recently used %v", gone, want)
	}
	if used, _ := s.Usage(); used > 2<<20 {
		t.Errorf("%d bytes are left, want at most half of 4 MiB", used)
	}
	for _, c := range []Keep{{LowWater: 0.9, HighWater: 0.5}, {HighWater: 1.5}, {LowWater: -1}, {MinFree: -1}, {Pinned: []digest.Digest{"x"}}} {
		if s, err := Open(Config{Dir: t.TempDir(), Keep: c}); err == nil {
			s.Close()
			t.Errorf("%+v was taken", c)
		}
	}
}

func TestFreeSpaceIsKept(t *testing.T) {
	s := open(t, Config{Keep: Keep{MinFree: 1_000_000}})
	s.avail = func() (int64, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return 2_500_000 - s.used - s.leaving, nil
	}
	first := ingest(t, s, noise(600_000, 1), nil)
	second := ingest(t, s, noise(600_000, 2), nil)
	third := ingest(t, s, noise(600_000, 3), nil)
	if there(s, first) || !there(s, second) || !there(s, third) {
		t.Errorf("first %v, second %v, third %v: want only the first evicted", there(s, first), there(s, second), there(s, third))
	}
	big := noise(1_600_000, 4)
	if _, err := s.Ingest(t.Context(), digest.FromBytes(big), int64(len(big)), bytes.NewReader(big), nil); !errors.Is(err, ErrFull) {
		t.Errorf("a blob that the file system has no room for: %v, want ErrFull", err)
	}
}

func TestPins(t *testing.T) {
	configured := digest.FromString("configured")
	s := open(t, Config{Keep: Keep{Pinned: []digest.Digest{configured}}})
	admin := http.NewServeMux()
	s.AdminRoutes(admin)
	s.ControlRoutes(admin)
	ask := func(method, path string) (int, string) {
		w := httptest.NewRecorder()
		admin.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		return w.Code, w.Body.String()
	}
	later := digest.FromBytes(noise(1000, 1)) // not there yet
	for _, c := range []struct {
		method, path string
		want         int
	}{
		{"PUT", "/cache/pins/" + later.String(), 204},
		{"PUT", "/cache/pins/" + later.String(), 204},
		{"PUT", "/cache/pins/sha256:..", 400},
		{"DELETE", "/cache/pins/" + configured.String(), 409},
		{"POST", "/cache/scrub", 202},
	} {
		if code, body := ask(c.method, c.path); code != c.want {
			t.Errorf("%s %s: %d %s, want %d", c.method, c.path, code, body, c.want)
		}
	}
	s = reopen(t, s)
	if want := []digest.Digest{later, configured}; len(s.Pins()) != 2 || !slices.Contains(s.Pins(), later) {
		t.Errorf("after a restart %v are pinned, want %v", s.Pins(), want)
	}
	admin = http.NewServeMux()
	s.AdminRoutes(admin)
	s.ControlRoutes(admin)
	if code, body := ask("GET", "/cache"); code != 200 || !strings.Contains(body, later.String()) {
		t.Errorf("GET /cache: %d %s", code, body)
	}
	if code, _ := ask("DELETE", "/cache/pins/"+later.String()); code != 204 {
		t.Errorf("unpin: %d", code)
	}
	if s = reopen(t, s); !slices.Equal(s.Pins(), []digest.Digest{configured}) {
		t.Errorf("%v are pinned, want only what is configured", s.Pins())
	}
}

func TestRecent(t *testing.T) {
	s := open(t, Config{})
	a, b := ingest(t, s, noise(2000, 1), nil), ingest(t, s, noise(2000, 2), nil)
	ingest(t, s, noise(10, 3), nil)
	large := func(i Info) bool { return i.Size > 1000 }
	s.entries[a].access = time.Now().Add(-time.Hour)
	digests := func(infos []Info) (out []digest.Digest) {
		for _, i := range infos {
			out = append(out, i.Digest)
		}
		return out
	}
	if got := digests(s.Recent(time.Now().Add(-time.Minute), 10, large)); !slices.Equal(got, []digest.Digest{b}) {
		t.Errorf("of the last minute: %v, want %v", got, b)
	}
	s.Touch(a, digest.FromString("not there"))
	if got := digests(s.Recent(time.Time{}, 10, large)); !slices.Equal(got, []digest.Digest{a, b}) {
		t.Errorf("all: %v, want the latest first", got)
	}
	if got := s.Recent(time.Time{}, 1, large); len(got) != 1 {
		t.Errorf("%d, want at most one", len(got))
	}
}
