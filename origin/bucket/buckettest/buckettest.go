// Package buckettest is what every bucket must do, as tests. Each driver runs it.
package buckettest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"kraken/origin/bucket"
	"kraken/proto/layout"
)

const d256 = digest.Digest("sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824")

// Run tests the buckets that open opens. Each call must give an empty one; open cleans up with t.
func Run(t *testing.T, open func(t *testing.T) bucket.Bucket) {
	t.Run("bytes come back", func(t *testing.T) { bytesComeBack(t, open(t)) })
	t.Run("replace and delete", func(t *testing.T) { replaceAndDelete(t, open(t)) })
	t.Run("a broken body leaves nothing", func(t *testing.T) { brokenBody(t, open(t)) })
	t.Run("a checked body", func(t *testing.T) { checkedBody(t, open(t)) })
	t.Run("list", func(t *testing.T) { list(t, open(t)) })
	t.Run("list ends with its callback", func(t *testing.T) { listEnds(t, open(t)) })
	t.Run("writers of one key", func(t *testing.T) { writersOfOneKey(t, open(t)) })
	t.Run("a cancelled call is no answer", func(t *testing.T) { cancelled(t, open(t)) })
}

func put(t *testing.T, b bucket.Bucket, key string, content []byte) {
	t.Helper()
	if err := b.Put(t.Context(), key, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
}

func want(t *testing.T, b bucket.Bucket, key string, off, length int64, content []byte) {
	t.Helper()
	r, err := b.Open(t.Context(), key, off, length)
	if err != nil {
		t.Error(err)
		return
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, content) {
		t.Errorf("%s from %d, %d bytes: got %d bytes, %v, want %d", key, off, length, len(got), err, len(content))
	}
}

func missing(t *testing.T, b bucket.Bucket, key string) {
	t.Helper()
	_, err := b.Stat(t.Context(), key)
	_, oerr := b.Open(t.Context(), key, 0, -1)
	if !errors.Is(err, bucket.ErrNotFound) || !errors.Is(oerr, bucket.ErrNotFound) || errors.Is(err, bucket.ErrUnavailable) || errors.Is(oerr, bucket.ErrUnavailable) {
		t.Errorf("%s: stat %v, open %v, want ErrNotFound alone", key, err, oerr)
	}
}

func bytesComeBack(t *testing.T, b bucket.Bucket) {
	big := make([]byte, 12<<20+1) // of several parts in S3
	rand.NewChaCha8([32]byte{1}).Read(big)
	for key, content := range map[string][]byte{layout.BlobKey(d256): big, layout.MetainfoKey(d256): []byte("m"), layout.TagCurrentLink("a.b/c__d", "v1_x"): {}} {
		put(t, b, key, content)
		if o, err := b.Stat(t.Context(), key); err != nil || o.Size != int64(len(content)) || o.Key != key {
			t.Errorf("stat %s: %+v, %v", key, o, err)
		}
		want(t, b, key, 0, -1, content)
	}
	want(t, b, layout.BlobKey(d256), 7, -1, big[7:])
	want(t, b, layout.BlobKey(d256), 5<<20, 100, big[5<<20:5<<20+100])
}

func replaceAndDelete(t *testing.T, b bucket.Bucket) {
	missing(t, b, "a/b")
	put(t, b, "a/b", []byte("older"))
	put(t, b, "a/b", []byte("new"))
	want(t, b, "a/b", 0, -1, []byte("new"))
	for range 2 { // one that is not there is fine
		if err := b.Delete(t.Context(), "a/b"); err != nil {
			t.Error(err)
		}
	}
	missing(t, b, "a/b")
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("the disk broke") }

func brokenBody(t *testing.T, b bucket.Bucket) {
	put(t, b, "old", []byte("old"))
	for _, key := range []string{"fresh", "old"} {
		if err := b.Put(t.Context(), key, io.MultiReader(bytes.NewReader(make([]byte, 6<<20)), failing{})); err == nil {
			t.Errorf("%s: a broken body was taken", key)
		}
	}
	missing(t, b, "fresh")
	want(t, b, "old", 0, -1, []byte("old"))
}

func checkedBody(t *testing.T, b bucket.Bucket) {
	for _, size := range []int{0, 10, 12<<20 + 1} { // of several parts in S3
		content := make([]byte, size)
		rand.NewChaCha8([32]byte{2}).Read(content)
		d := digest.FromBytes(content)
		key := layout.BlobKey(d)
		body := func(d digest.Digest) *bucket.Checked {
			c, err := bucket.NewChecked(d, bytes.NewReader(content))
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		if err := b.Put(t.Context(), key, body(digest.FromString("other"))); !errors.Is(err, bucket.ErrContent) {
			t.Errorf("%d bytes of other content: %v, want ErrContent", size, err)
		}
		missing(t, b, key)
		put(t, b, key, []byte("wrong"))
		if o, err := b.Stat(t.Context(), key); err != nil || o.Digest != "" {
			t.Errorf("an object that nobody checked: %+v, %v", o, err)
		}
		if err := b.Put(t.Context(), key, body(d)); err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
		if o, err := b.Stat(t.Context(), key); err != nil || o.Size != int64(size) || o.Digest != "" && o.Digest != d {
			t.Errorf("stat of %d bytes: %+v, %v", size, o, err)
		}
		want(t, b, key, 0, -1, content)
		put(t, b, key, []byte("wrong again"))
		if o, err := b.Stat(t.Context(), key); err != nil || o.Digest != "" {
			t.Errorf("what was written in its place keeps the digest: %+v, %v", o, err)
		}
	}
}

func list(t *testing.T, b bucket.Bucket) {
	keys := []string{"r/a-b/x", "r/a/x", "r/a/y", "r/b/x"}
	for _, k := range append([]string{"other"}, keys...) {
		put(t, b, k, []byte(k))
	}
	var got []string
	err := b.List(t.Context(), "r/", "", func(o bucket.Object) error {
		if o.Size != int64(len(o.Key)) {
			t.Errorf("%+v", o)
		}
		got = append(got, o.Key)
		return nil
	})
	if err != nil || !slices.Equal(got, keys) {
		t.Errorf("listed %v, %v, want %v", got, err, keys)
	}
	// More than a page: a- sorts before a/, although the folder a comes before a-b.
	want := map[string]bool{}
	for i := range 400 {
		for _, repo := range []string{"a", "a-b", "a.b"} {
			key := fmt.Sprintf("many/%s/%d", repo, i)
			put(t, b, key, nil)
			want[key] = true
		}
	}
	got = nil
	err = b.List(t.Context(), "many/", "", func(o bucket.Object) error {
		if !want[o.Key] {
			t.Errorf("%s was listed twice or never written", o.Key)
		}
		delete(want, o.Key)
		got = append(got, o.Key)
		return nil
	})
	if err != nil || len(want) > 0 || !slices.IsSorted(got) {
		t.Errorf("%v, %d of the keys were not listed, sorted: %v", err, len(want), slices.IsSorted(got))
	}
	for _, after := range []string{"many/a-b/", "many/a.b/7", "many/a/399", "many/a/zz", "many/", "m", "n"} {
		wanted := slices.DeleteFunc(slices.Clone(got), func(key string) bool { return key <= after })
		var rest []string
		err := b.List(t.Context(), "many/", after, func(o bucket.Object) error { rest = append(rest, o.Key); return nil })
		if err != nil || !slices.Equal(rest, wanted) {
			t.Errorf("after %s: %d keys, %v; want %d", after, len(rest), err, len(wanted))
		}
	}
	if err := b.List(t.Context(), "none/", "", func(o bucket.Object) error { t.Errorf("listed %s", o.Key); return nil }); err != nil {
		t.Error(err)
	}
}

func listEnds(t *testing.T, b bucket.Bucket) {
	for _, k := range []string{"r/a", "r/b"} {
		put(t, b, k, nil)
	}
	enough := errors.New("enough")
	n := 0
	if err := b.List(t.Context(), "r/", "", func(bucket.Object) error { n++; return enough }); !errors.Is(err, enough) || n != 1 {
		t.Errorf("%d calls, %v", n, err)
	}
}

// writersOfOneKey: a reader sees one of the objects whole, whoever came last.
func writersOfOneKey(t *testing.T, b bucket.Bucket) {
	contents := [][]byte{bytes.Repeat([]byte("a"), 1<<20), bytes.Repeat([]byte("b"), 1<<20)}
	put(t, b, "k", contents[0])
	var wg sync.WaitGroup
	for _, c := range contents {
		wg.Go(func() {
			for range 5 {
				if err := b.Put(t.Context(), "k", bytes.NewReader(c)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 10 {
		r, err := b.Open(t.Context(), "k", 0, -1)
		if err != nil {
			t.Error(err)
			continue
		}
		got, err := io.ReadAll(r)
		r.Close()
		if err != nil || !bytes.Equal(got, contents[0]) && !bytes.Equal(got, contents[1]) {
			t.Errorf("a mixture, or not all: %d bytes, %v", len(got), err)
		}
	}
	wg.Wait()
}

// cancelled: who gives up learns nothing of the object, least of all that there is none.
func cancelled(t *testing.T, b bucket.Bucket) {
	put(t, b, "there", []byte("x"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.Stat(ctx, "absent"); errors.Is(err, bucket.ErrNotFound) && errors.Is(err, bucket.ErrUnavailable) {
		t.Errorf("stat: %v, which is both", err)
	}
	if err := b.Put(ctx, "fresh", bytes.NewReader(make([]byte, 1<<20))); err == nil {
		t.Error("a put that was given up was taken")
	}
	missing(t, b, "fresh")
	want(t, b, "there", 0, -1, []byte("x"))
}
