package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"kraken/proto/config"
	"kraken/test/testfs"
)

// stand opens a bucket of a testfs of its own.
func stand(t *testing.T) (Bucket, *testfs.Server) {
	t.Helper()
	s, err := testfs.New(testfs.Config{Listen: "127.0.0.1:0", Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	url := fmt.Sprintf("s3://%s?endpoint=http://%s&region=us-east-1&use_path_style=true", testfs.Bucket, s.Addr())
	return mustOpen(t, Config{URL: url, AccessKey: config.NewSecret("a"), SecretKey: config.NewSecret("b")}), s
}

func mustOpen(t *testing.T, cfg Config) Bucket {
	t.Helper()
	cfg.Name = "test"
	b, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestBuckets is what every driver must do.
func TestBuckets(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) Bucket{
		"mem":  func(t *testing.T) Bucket { return mustOpen(t, Config{URL: "mem://"}) },
		"file": func(t *testing.T) Bucket { return mustOpen(t, Config{URL: "file://" + t.TempDir()}) },
		"s3":   func(t *testing.T) Bucket { b, _ := stand(t); return b },
	} {
		t.Run(name, func(t *testing.T) {
			t.Run("bytes come back", func(t *testing.T) { bytesComeBack(t, open(t)) })
			t.Run("replace and delete", func(t *testing.T) { replaceAndDelete(t, open(t)) })
			t.Run("a broken body leaves nothing", func(t *testing.T) { brokenBody(t, open(t)) })
			t.Run("list", func(t *testing.T) { list(t, open(t)) })
		})
	}
}

func put(t *testing.T, b Bucket, key string, content []byte) {
	t.Helper()
	if err := b.Put(t.Context(), key, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
}

func want(t *testing.T, b Bucket, key string, off, length int64, content []byte) {
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

func missing(t *testing.T, b Bucket, key string) {
	t.Helper()
	_, err := b.Stat(t.Context(), key)
	_, oerr := b.Open(t.Context(), key, 0, -1)
	if !errors.Is(err, ErrNotFound) || !errors.Is(oerr, ErrNotFound) || errors.Is(err, ErrUnavailable) || errors.Is(oerr, ErrUnavailable) {
		t.Errorf("%s: stat %v, open %v, want ErrNotFound alone", key, err, oerr)
	}
}

func bytesComeBack(t *testing.T, b Bucket) {
	big := make([]byte, 12<<20+1) // of several parts in S3
	rand.NewChaCha8([32]byte{1}).Read(big)
	for key, content := range map[string][]byte{BlobKey(d256): big, MetainfoKey(d256): []byte("m"), TagCurrentLink("a.b/c__d", "v1_x"): {}} {
		put(t, b, key, content)
		if o, err := b.Stat(t.Context(), key); err != nil || o.Size != int64(len(content)) || o.Key != key {
			t.Errorf("stat %s: %+v, %v", key, o, err)
		}
		want(t, b, key, 0, -1, content)
	}
	want(t, b, BlobKey(d256), 7, -1, big[7:])
	want(t, b, BlobKey(d256), 5<<20, 100, big[5<<20:5<<20+100])
}

func replaceAndDelete(t *testing.T, b Bucket) {
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

func brokenBody(t *testing.T, b Bucket) {
	put(t, b, "old", []byte("old"))
	for _, key := range []string{"fresh", "old"} {
		if err := b.Put(t.Context(), key, io.MultiReader(bytes.NewReader(make([]byte, 6<<20)), failing{})); err == nil {
			t.Errorf("%s: a broken body was taken", key)
		}
	}
	missing(t, b, "fresh")
	want(t, b, "old", 0, -1, []byte("old"))
}

func list(t *testing.T, b Bucket) {
	keys := []string{"r/a-b/x", "r/a/x", "r/a/y", "r/b/x"}
	for _, k := range append([]string{"other"}, keys...) {
		put(t, b, k, []byte(k))
	}
	var got []string
	err := b.List(t.Context(), "r/", func(o Object) error {
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
	err = b.List(t.Context(), "many/", func(o Object) error {
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
	if err := b.List(t.Context(), "none/", func(o Object) error { t.Errorf("listed %s", o.Key); return nil }); err != nil {
		t.Error(err)
	}
	enough := errors.New("enough")
	n := 0
	if err := b.List(t.Context(), "r/", func(Object) error { n++; return enough }); !errors.Is(err, enough) || n != 1 {
		t.Errorf("%d calls, %v", n, err)
	}
}

// A folder holds what other registries can read: files at their keys, no side files, no temporary ones elsewhere.
func TestFolderHoldsNothingElse(t *testing.T) {
	dir, tmp := t.TempDir(), t.TempDir()
	t.Setenv("TMPDIR", tmp)
	b := mustOpen(t, Config{URL: "file://" + dir})
	keys := []string{BlobKey(d256), RevisionLink("a/b", d256), TagCurrentLink("a/b", "v1")}
	for _, k := range keys {
		if err := b.Put(t.Context(), k, io.MultiReader(bytes.NewReader([]byte(k)), empty(t, tmp))); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			rel, rerr := filepath.Rel(dir, p)
			got, err = append(got, filepath.ToSlash(rel)), rerr
		}
		return err
	})
	slices.Sort(keys)
	if err != nil || !slices.Equal(got, keys) {
		t.Errorf("the folder holds %v, %v, want %v", got, err, keys)
	}
	content, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(keys[0])))
	if err != nil || string(content) != keys[0] {
		t.Errorf("%q, %v", content, err)
	}
}

// empty is an empty end of a body, which sees that nothing is in a folder while the body is being written.
func empty(t *testing.T, dir string) io.Reader { return watcher{t, dir} }

type watcher struct {
	t   *testing.T
	dir string
}

func (w watcher) Read([]byte) (int, error) {
	if es, err := os.ReadDir(w.dir); err != nil || len(es) > 0 {
		w.t.Errorf("the temporary folder holds %v, %v", es, err)
	}
	return 0, io.EOF
}

func TestUnreachableIsNotMissing(t *testing.T) {
	b, s := stand(t)
	put(t, b, "a", []byte("a"))
	s.SetDown(true)
	check := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v, want ErrUnavailable", what, err)
		}
	}
	_, err := b.Stat(t.Context(), "a")
	check("stat", err)
	_, err = b.Open(t.Context(), "a", 0, -1)
	check("open", err)
	check("put", b.Put(t.Context(), "a", bytes.NewReader([]byte("b"))))
	check("delete", b.Delete(t.Context(), "a"))
	check("list", b.List(t.Context(), "", func(Object) error { return nil }))
	s.SetDown(false)
	want(t, b, "a", 0, -1, []byte("a"))
}

// A folder that is not mounted must not look like an empty bucket: build-index would restore nothing and say that it is all.
func TestFolderThatIsGone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "bucket")
	b := mustOpen(t, Config{URL: "file://" + dir})
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := b.List(t.Context(), "a/", func(Object) error { return nil }); !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrNotFound) {
		t.Errorf("list: %v, want ErrUnavailable", err)
	}
}

func TestConfigsAreRefused(t *testing.T) {
	for _, cfgs := range [][]Config{
		nil,
		{{URL: "mem://"}},
		{{Name: "a", URL: "mem://"}, {Name: "a", URL: "mem://"}},
		{{Name: "a", URL: "file://relative"}},
		{{Name: "a", URL: "ftp://x"}},
		{{Name: "a", URL: "s3://x?regoin=y"}},
		{{Name: "a", URL: "mem://", Repositories: "("}},
	} {
		if _, err := OpenAll(t.Context(), cfgs); err == nil {
			t.Errorf("%+v was taken", cfgs)
		}
	}
}

func TestFirstMatchingBucket(t *testing.T) {
	s, err := OpenAll(t.Context(), []Config{{Name: "team", URL: "mem://", Repositories: "team/.*"}, {Name: "rest", URL: "mem://", Repositories: "[a-m].*"}})
	if err != nil {
		t.Fatal(err)
	}
	for repo, want := range map[string]string{"team/a": "team", "a/team/a": "rest", "zoo": "", "teams": ""} {
		if name, _, ok := s.For(repo); name != want || ok != (want != "") {
			t.Errorf("%s goes to %q, want %q", repo, name, want)
		}
	}
}
