package store

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func openFiles(t *testing.T) int {
	t.Helper()
	es, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	return len(es)
}

// A session between two requests costs no descriptor, and its commit reads nothing again.
func TestIdleSessionHoldsNoDescriptor(t *testing.T) {
	s := open(t, Config{})
	before := openFiles(t)
	var last *Upload
	for range 300 {
		u, err := s.NewUpload(UploadOptions{Size: -1})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := u.Write(t.Context(), 0, strings.NewReader("he")); err != nil {
			t.Fatal(err)
		}
		last = u
	}
	if n := openFiles(t) - before; n > 10 {
		t.Errorf("300 sessions hold %d descriptors", n)
	}
	if _, err := last.Write(t.Context(), 2, strings.NewReader("llo")); err != nil {
		t.Fatal(err)
	}
	if last.hashed != 5 {
		t.Errorf("%d of 5 bytes are hashed: the commit reads the others again", last.hashed)
	}
	if _, err := last.Commit(t.Context(), digest.FromString("hello"), nil); err != nil {
		t.Error(err)
	}
}

func TestSessionsAreBounded(t *testing.T) {
	s := open(t, Config{Sessions: Sessions{Max: 5, MaxPerSource: 3}})
	begin := func(source string) (*Upload, error) {
		return s.NewUpload(UploadOptions{Size: -1, Source: source})
	}
	var ups []*Upload
	for _, source := range []string{"a", "a", "a", "b", "b"} {
		u, err := begin(source)
		if err != nil {
			t.Fatal(err)
		}
		ups = append(ups, u)
	}
	if _, err := begin("a"); !errors.Is(err, ErrTooMany) {
		t.Errorf("one more of a: %v, want ErrTooMany", err)
	}
	ups[0].touched.Add(-5)
	ups[1].touched.Add(-10)
	if _, err := begin("c"); err != nil {
		t.Errorf("the first of c, for which one of a makes room: %v", err)
	}
	for i, want := range []error{nil, ErrUploadUnknown, nil} { // the idlest went
		if _, err := s.Upload(ups[i].ID()); !errors.Is(err, want) {
			t.Errorf("session %d of a: %v, want %v", i, err, want)
		}
	}
	if _, err := begin("b"); !errors.Is(err, ErrTooMany) {
		t.Errorf("one more of b, of which nobody has more: %v, want ErrTooMany", err)
	}
	if _, err := s.NewUpload(UploadOptions{Size: -1, Transient: true}); err != nil {
		t.Errorf("a role's own: %v", err)
	}
	if err := ups[4].Abort(); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s)
	if _, err := begin("c"); err != nil {
		t.Errorf("after the end of another, and a restart: %v", err)
	}
	if _, err := begin("c"); !errors.Is(err, ErrTooMany) {
		t.Errorf("sessions of the last run don't count: %v", err)
	}
}

// Whoever makes up sources, or has many, takes no more than turns from a source that is at it.
func TestManySourcesStopNobody(t *testing.T) {
	s := open(t, Config{Sessions: Sessions{Max: 64, MaxPerSource: 8}})
	for i := range 500 {
		if _, err := s.NewUpload(UploadOptions{Size: -1, Source: string(rune('A' + i/8))}); err != nil && i < 64 {
			t.Fatal(err)
		}
	}
	u, err := s.NewUpload(UploadOptions{Size: -1, Source: "honest"})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 500 { // each of them is idle for longer than the honest one's last chunk is ago
		if _, err := u.Write(t.Context(), int64(i), strings.NewReader("x")); err != nil {
			t.Fatalf("chunk %d: %v", i, err)
		}
		u.touched.Add(1)
		if _, err := s.NewUpload(UploadOptions{Size: -1, Source: "A", Note: "again"}); err != nil && !errors.Is(err, ErrTooMany) {
			t.Fatal(err)
		}
	}
	if _, err := u.Commit(t.Context(), digest.FromString(strings.Repeat("x", 500)), nil); err != nil {
		t.Error(err)
	}
}

// Sessions that fill their share leave room for names and for the commits of others.
func TestSessionsFillTheirShareOnly(t *testing.T) {
	s := open(t, Config{Capacity: 4 << 20, Sessions: Sessions{Share: 0.5, SharePerSource: 0.25}})
	chunk := noise(300_000, 1)
	fill := func(source string) (n int64, err error) {
		for err == nil {
			var u *Upload
			if u, err = s.NewUpload(UploadOptions{Size: -1, Source: source}); err != nil {
				return n, err
			}
			var k int64
			k, err = u.Write(t.Context(), 0, bytes.NewReader(chunk))
			n += k
		}
		return n, err
	}
	one, err := s.NewUpload(UploadOptions{Size: -1, Source: "honest"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := one.Write(t.Context(), 0, strings.NewReader("hello")); err != nil {
		t.Fatal(err)
	}
	for _, source := range []string{"a", "b", "c"} {
		if n, err := fill(source); !errors.Is(err, ErrTooMany) || n > 1<<20 {
			t.Errorf("%s took %d bytes: %v, want ErrTooMany after 1 MiB at most", source, n, err)
		}
	}
	if got := s.held().bytes; got > 2<<20 {
		t.Errorf("sessions have %d bytes, want 2 MiB at most", got)
	}
	if used, _ := s.Usage(); used < s.held().bytes {
		t.Errorf("%d bytes are used, and sessions have %d", used, s.held().bytes)
	}
	if err := s.PutName(strings.Repeat("0", 64), []byte("a record")); err != nil {
		t.Error(err)
	}
	if _, err := one.Commit(t.Context(), digest.FromString("hello"), &Marker{Targets: []string{"b"}}); err != nil {
		t.Error(err)
	}
	u, err := s.NewUpload(UploadOptions{Size: -1, Source: "d"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Write(t.Context(), 0, bytes.NewReader(make([]byte, 2<<20))); !errors.Is(err, ErrFull) && !errors.Is(err, ErrTooMany) {
		t.Errorf("a blob that never fits: %v", err)
	}
}

func TestNamesKeepTheirSpace(t *testing.T) {
	s := open(t, Config{Sessions: Sessions{Share: 0.5, SharePerSource: 0.5}})
	s.avail = func() (int64, error) { return 1 << 20, nil }
	u, err := s.NewUpload(UploadOptions{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Write(t.Context(), 0, strings.NewReader("x")); !errors.Is(err, ErrFull) {
		t.Errorf("with 1 MiB free: %v, want ErrFull", err)
	}
	if got := s.held().bytes; got != 0 {
		t.Errorf("%d bytes are accounted, and none came", got)
	}
}

// slow gives a byte, then waits.
type slow struct{ began, end chan struct{} }

func (r slow) Read(b []byte) (int, error) {
	close(r.began)
	<-r.end
	return 0, errors.New("the client went away")
}

func TestWritersAreBounded(t *testing.T) {
	s := open(t, Config{Sessions: Sessions{Writers: 1}})
	one, err := s.NewUpload(UploadOptions{Size: -1})
	other, err2 := s.NewUpload(UploadOptions{Size: -1})
	if errors.Join(err, err2) != nil {
		t.Fatal(err, err2)
	}
	body, done := slow{make(chan struct{}), make(chan struct{})}, make(chan error)
	go func() {
		_, err := one.Write(t.Context(), 0, body)
		done <- err
	}()
	<-body.began
	if _, err := other.Write(t.Context(), 0, strings.NewReader("x")); !errors.Is(err, ErrTooMany) {
		t.Errorf("a second writer: %v, want ErrTooMany", err)
	}
	close(body.end)
	if err := <-done; err == nil {
		t.Error("a body that broke off was taken")
	}
	if _, err := other.Write(t.Context(), 0, strings.NewReader("x")); err != nil {
		t.Error(err)
	}
}
