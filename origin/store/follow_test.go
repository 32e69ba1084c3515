package store

import (
	"bytes"
	"context"
	"crypto/sha1"
	"errors"
	"io"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

func TestFollow(t *testing.T) {
	content := noise(300_000, 1)
	for _, tt := range []struct {
		name    string
		hold    LastByte
		from    int64
		fails   bool
		want    []byte // before the end is known
		wantErr error
	}{
		{"from the first byte", HoldFromAll, 0, false, content[:len(content)-1], nil},
		{"a part", HoldFromAll, 1000, false, content[1000 : len(content)-1], nil},
		{"a part of one that holds it back from who reads all", HoldFromWhole, 1000, false, content[1000:], nil},
		{"a wrong blob never ends clean", HoldFromWhole, 0, true, content[:len(content)-1], ErrDigestMismatch},
		{"verified before it was published", HoldFromNone, 0, false, content, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t, Config{Dir: t.TempDir()})
			u, err := s.NewUpload(UploadOptions{Size: int64(len(content)), Transient: true})
			if err != nil {
				t.Fatal(err)
			}
			g, err := u.Growth()
			if err != nil {
				t.Fatal(err)
			}
			defer g.Close()
			if _, err := u.Growth(); !errors.Is(err, ErrBusy) {
				t.Fatalf("a second one: %v", err)
			}
			r := Follow(t.Context(), g, int64(len(content)), tt.hold)
			if _, err := r.Seek(tt.from, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			pr, pw := io.Pipe()
			go func() {
				_, err := io.Copy(pw, r)
				pw.CloseWithError(err)
			}()
			if _, err := u.Write(t.Context(), 0, bytes.NewReader(content)); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(tt.want))
			if _, err := io.ReadFull(pr, got); err != nil || !bytes.Equal(got, tt.want) {
				t.Fatalf("before the end: %v, equal %t", err, bytes.Equal(got, tt.want))
			}
			d := digest.FromBytes(content)
			if tt.fails {
				d = digest.FromString("another")
			}
			_, err = u.Commit(t.Context(), d, nil)
			g.End(err)
			rest, err := io.ReadAll(pr)
			if !errors.Is(err, tt.wantErr) {
				t.Fatalf("the end: %v, want %v", err, tt.wantErr)
			}
			if err == nil && !bytes.Equal(append(got, rest...), content[tt.from:]) {
				t.Fatal("other bytes")
			}
		})
	}
}

func TestFollowerGivesUp(t *testing.T) {
	s := open(t, Config{Dir: t.TempDir()})
	u, err := s.NewUpload(UploadOptions{Size: 10, Transient: true})
	if err != nil {
		t.Fatal(err)
	}
	g, err := u.Growth()
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := Follow(ctx, fakeGrowing{}, 10, HoldFromAll).Read(make([]byte, 1)); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
	})
	g.End(nil)
	if _, err := Follow(t.Context(), g, 10, HoldFromAll).Read(make([]byte, 1)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("an end without the bytes: %v", err)
	}
}

// fakeGrowing never grows.
type fakeGrowing struct{}

func (fakeGrowing) ReadAt([]byte, int64) (int, error) { return 0, io.EOF }
func (fakeGrowing) Wait(ctx context.Context, _ int64) (int64, error) {
	<-ctx.Done()
	return 0, ctx.Err()
}
func (fakeGrowing) Verified(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

// TestPiecesFromAnywhere: any number of a piece may be asked from, also one whose hash would begin beyond the largest
// offset.
func TestPiecesFromAnywhere(t *testing.T) {
	g := &Growth{}
	two := make([]byte, 2*sha1.Size)
	g.pieces.Store(&two)
	for from, want := range map[int]int{0: 2, 1: 1, 2: 0, 3: 0, math.MaxInt/sha1.Size + 1: 0, math.MaxInt/sha1.Size*2 + 3: 0, math.MaxInt: 0} {
		if hashes, _ := g.Pieces(from); len(hashes) != want*sha1.Size {
			t.Errorf("from %d: %d bytes, want %d hashes", from, len(hashes), want)
		}
	}
}
