package origin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// scrubbed waits until the origin has verified a blob again, and returns how many it has.
func scrubbed(t *testing.T, o *Origin) int64 {
	t.Helper()
	deadline, tick := time.After(20*time.Second), time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if n, _ := o.store.Scrubbed(); n > 0 {
			return n
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("nothing was verified in 20 s")
		}
	}
}

// TestDoubtsAreBounded: who says of a good blob again and again that it is wrong makes the origin read it once.
func TestDoubtsAreBounded(t *testing.T) {
	o, c := alone(t)
	content := bytes.Repeat([]byte("a layer "), 1<<17)
	d := digest.FromBytes(content)
	if err := c.Replicate(t.Context(), "r", d, int64(len(content)), false, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		if err := c.Verify(t.Context(), "r", d); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Verify(t.Context(), "r", digest.FromString("nobody has it")); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("a blob that is not here: %v, want ErrBlobUnknown", err)
	}
	if n := scrubbed(t, o); n != 1 {
		t.Errorf("the blob was read %d times", n)
	}
	if _, err := o.store.Stat(d); err != nil {
		t.Errorf("the good blob is gone: %v", err)
	}
}

// TestDebts: a debt is taken over for a blob that is here with the size that is said, and merged.
func TestDebts(t *testing.T) {
	o, c := alone(t)
	content := []byte("a layer")
	d := digest.FromBytes(content)
	debt := cluster.Debt{Repositories: []string{"r/one"}, Size: int64(len(content))}
	if err := c.TakeDebt(t.Context(), d, debt); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("a blob that is not here: %v, want ErrBlobUnknown", err)
	}
	withoutBucket(t, o)
	if err := c.Replicate(t.Context(), "r", d, int64(len(content)), false, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Owes(t.Context(), "r", d); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("a copy without debt: %v, want ErrBlobUnknown", err)
	}
	short := debt
	short.Size--
	if err := c.TakeDebt(t.Context(), d, short); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("another size: %v, want ErrUnavailable", err)
	}
	for _, repo := range []string{"r/one", "r/two"} {
		debt.Repositories = []string{repo}
		if err := c.TakeDebt(t.Context(), d, debt); err != nil {
			t.Fatal(err)
		}
	}
	got, err := c.Owes(t.Context(), "r", d)
	if err != nil || len(got.Repositories) != 2 || got.Size != int64(len(content)) {
		t.Errorf("owes %+v, %v, want both repositories", got, err)
	}
	debt.Repositories = nil
	for i := range cluster.MaxDebt + 1 {
		debt.Repositories = append(debt.Repositories, fmt.Sprintf("many/%d", i))
	}
	if err := c.TakeDebt(t.Context(), d, debt); err != nil {
		t.Fatal(err)
	}
	if got, err = c.Owes(t.Context(), "r", d); err != nil || len(got.Repositories) != len(debt.Repositories)+2 {
		t.Errorf("owes for %d repositories, %v, want all %d: who copies the blob owes it for what it hears", len(got.Repositories), err, len(debt.Repositories)+2)
	}
}

// A debt is not taken over from who drops its copy when this one has rotted, however lately that was looked at.
func TestRottenCopyIsNoReasonToLeave(t *testing.T) {
	o, c := alone(t)
	withoutBucket(t, o) // which would heal it
	content := bytes.Repeat([]byte("a layer "), 1<<10)
	d := digest.FromBytes(content)
	if err := c.Replicate(t.Context(), "r/one", d, int64(len(content)), true, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	debt := cluster.Debt{Repositories: []string{"r/one"}, Size: int64(len(content)), Leaving: true}
	if err := c.TakeDebt(t.Context(), d, debt); err != nil {
		t.Fatal(err)
	}
	damage(t, o, d)
	if err := c.TakeDebt(t.Context(), d, debt); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("%v, want %v", err, registry.ErrBlobUnknown)
	}
}

// withoutBucket makes an origin's bucket one that can't be read or written.
func withoutBucket(t *testing.T, o *Origin) {
	t.Helper()
	dir := filepath.Join(filepath.Dir(o.cfg.Dir), "bucket")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// damage flips a bit of a blob on an origin's disk.
func damage(t *testing.T, o *Origin, d digest.Digest) {
	t.Helper()
	r, err := o.store.Open(d)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", r.File().Fd()), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, 1); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, 1); err != nil {
		t.Fatal(err)
	}
}

// A blob that has become whole between a look at the disk and the beginning of a fetch is not fetched again.
func TestWhatHasBecomeWholeIsNotFetched(t *testing.T) {
	o, c := alone(t)
	content := []byte("a layer")
	d := digest.FromBytes(content)
	if err := c.Replicate(t.Context(), "r", d, int64(len(content)), false, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	f, err := o.joinFetch(t.Context(), fromBucket(d), "asked", func(context.Context) (*fetch, error) {
		t.Error("a fetch is begun")
		return nil, errors.New("there is none")
	})
	if err != nil {
		t.Fatal(err)
	}
	if a, err := f.arriving(t.Context(), cluster.ArrivingRequest{Wait: true}); err != nil || !a.Whole || a.Size != int64(len(content)) {
		t.Errorf("it arrives as %+v, %v, want whole", a, err)
	}
	r, err := f.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if b, err := io.ReadAll(r.Reader()); err != nil || string(b) != string(content) {
		t.Errorf("reads %q, %v", b, err)
	}
}
