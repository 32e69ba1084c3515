package origin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/bucket"
	"kraken/origin/store"
	"kraken/proto/registry"
)

// TestTrouble: an origin that asks to come back is no trouble that the log warns of, unless another has some.
func TestTrouble(t *testing.T) {
	later := fmt.Errorf("hand over: %w", &registry.RetryError{Err: registry.ErrUnavailable, After: time.Second})
	down := errors.New("connection refused")
	for _, c := range []struct {
		name  string
		errs  []error
		later bool
	}{
		{"all verify", []error{later, later}, true},
		{"one is down", []error{down}, false},
		{"one is down, one verifies", []error{later, down, later}, false},
	} {
		if err := trouble(c.errs); err == nil || isLater(err) != c.later {
			t.Errorf("%s: %v, later %v", c.name, err, isLater(err))
		}
	}
	if err := trouble(nil); err != nil {
		t.Errorf("nothing failed: %v", err)
	}
}

// What is told of write-back is that of the debts that are left: the success of another blob ends no error, and what is
// paid is neither an error nor alone, whoever paid it.
func TestWritebackTellsOfWhatIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good := &heads{stat: func(context.Context, string) (bucket.Object, error) {
			return bucket.Object{Size: int64(len("good")), Digest: digest.FromString("good")}, nil
		}}
		bad := &heads{stat: func(context.Context, string) (bucket.Object, error) {
			return bucket.Object{}, fmt.Errorf("%w: refused for good", bucket.ErrUnavailable)
		}}
		o := withBuckets(t, map[string]bucket.Bucket{"good": good, "bad": bad})
		owe := func(target string) (digest.Digest, store.Marker) {
			m := store.Marker{Targets: []string{target}, Repositories: []string{target + "/repo"}, Created: time.Now()}
			d := digest.FromString(target)
			if _, err := o.store.Ingest(t.Context(), d, int64(len(target)), strings.NewReader(target), &m); err != nil {
				t.Fatal(err)
			}
			return d, m
		}
		ended := make(chan error)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { ended <- o.writeback(ctx) }()
		defer func() {
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}()
		told := func(what string, n int, failing bool) {
			t.Helper()
			time.Sleep(3 * time.Second)
			if s := o.status(); s.Pending != n || strings.Contains(s.Error, "refused for good") != failing || s.Alone > s.Pending {
				t.Errorf("%s: %d pending, %d alone, error %q", what, s.Pending, s.Alone, s.Error)
			}
		}
		d, m := owe("bad")
		told("one can't be paid", 1, true)
		owe("good")
		told("another one is paid", 1, true)
		if err := o.store.Unmark(d, m, "bad"); err != nil {
			t.Fatal(err)
		}
		told("all is paid", 0, false)
	})
}

// Put takes what write-back writes.
func (h *heads) Put(_ context.Context, _ string, r io.Reader) error {
	_, err := io.Copy(&bytes.Buffer{}, r)
	return err
}
