package bucket_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"kraken/origin/bucket"
	"kraken/origin/bucket/buckettest"
	"kraken/proto/config"
	"kraken/test/testfs"
)

// stand opens a bucket of a testfs of its own.
func stand(t *testing.T) (bucket.Bucket, *testfs.Server) {
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
	return mustOpen(t, bucket.Config{URL: url, AccessKey: config.NewSecret("a"), SecretKey: config.NewSecret("b")}), s
}

func mustOpen(t *testing.T, cfg bucket.Config) bucket.Bucket {
	t.Helper()
	cfg.Name = "test"
	b, err := bucket.Open(t.Context(), cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestMemory(t *testing.T) {
	buckettest.Run(t, func(t *testing.T) bucket.Bucket { return mustOpen(t, bucket.Config{URL: "mem://"}) })
}

func TestFile(t *testing.T) {
	buckettest.Run(t, func(t *testing.T) bucket.Bucket { return mustOpen(t, bucket.Config{URL: "file://" + t.TempDir()}) })
}

func TestS3(t *testing.T) {
	buckettest.Run(t, func(t *testing.T) bucket.Bucket { b, _ := stand(t); return b })
}

// A folder holds what other registries can read: files at their keys, no side files, no temporary ones elsewhere.
func TestFolderHoldsNothingElse(t *testing.T) {
	dir, tmp := t.TempDir(), t.TempDir()
	t.Setenv("TMPDIR", tmp)
	b := mustOpen(t, bucket.Config{URL: "file://" + dir})
	keys := []string{"blobs/a/data", "repositories/a/b/_manifests/revisions/link", "repositories/a/b/_manifests/tags/v1/current/link"}
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
	if err := b.Put(t.Context(), "a", bytes.NewReader([]byte("a"))); err != nil {
		t.Fatal(err)
	}
	s.SetDown(true)
	check := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, bucket.ErrUnavailable) || errors.Is(err, bucket.ErrNotFound) {
			t.Errorf("%s: %v, want ErrUnavailable", what, err)
		}
	}
	_, err := b.Stat(t.Context(), "a")
	check("stat", err)
	_, err = b.Open(t.Context(), "a", 0, -1)
	check("open", err)
	check("put", b.Put(t.Context(), "a", bytes.NewReader([]byte("b"))))
	check("delete", b.Delete(t.Context(), "a"))
	check("list", b.List(t.Context(), "", "", func(bucket.Object) error { return nil }))
	s.SetDown(false)
	if o, err := b.Stat(t.Context(), "a"); err != nil || o.Size != 1 {
		t.Errorf("%+v, %v", o, err)
	}
}

// A folder that is not mounted must not look like an empty bucket: build-index would restore nothing and say that it is
// all.
func TestFolderThatIsGone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "bucket")
	b := mustOpen(t, bucket.Config{URL: "file://" + dir})
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := b.List(t.Context(), "a/", "", func(bucket.Object) error { return nil }); !errors.Is(err, bucket.ErrUnavailable) || errors.Is(err, bucket.ErrNotFound) {
		t.Errorf("list: %v, want ErrUnavailable", err)
	}
}

func TestConfigsAreRefused(t *testing.T) {
	for _, cfgs := range [][]bucket.Config{
		nil,
		{{URL: "mem://"}},
		{{Name: "a", URL: "mem://"}, {Name: "a", URL: "mem://"}},
		{{Name: "a", URL: "file://relative"}},
		{{Name: "a", URL: "ftp://x"}},
		{{Name: "a", URL: "s3://x?regoin=y"}},
		{{Name: "a", URL: "mem://", Repositories: "("}},
	} {
		if _, err := bucket.OpenAll(t.Context(), cfgs, nil); err == nil {
			t.Errorf("%+v was taken", cfgs)
		}
	}
}

func TestFirstMatchingBucket(t *testing.T) {
	s, err := bucket.OpenAll(t.Context(), []bucket.Config{{Name: "team", URL: "mem://", Repositories: "team/.*"}, {Name: "rest", URL: "mem://", Repositories: "[a-m].*"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for repo, want := range map[string]string{"team/a": "team", "a/team/a": "rest", "zoo": "", "teams": ""} {
		if name, _, ok := s.For(repo); name != want || ok != (want != "") {
			t.Errorf("%s goes to %q, want %q", repo, name, want)
		}
	}
}

// TestFolderModes: files of a bucket in a folder are its owner's alone, unless the URL says who else may read them.
func TestFolderModes(t *testing.T) {
	for query, want := range map[string][2]os.FileMode{"": {0o600, 0o700}, "?mode=0640": {0o640, 0o750}, "?mode=0644": {0o644, 0o755}} {
		dir := filepath.Join(t.TempDir(), "bucket")
		b := mustOpen(t, bucket.Config{URL: "file://" + dir + query})
		if err := b.Put(t.Context(), "a/b/c", bytes.NewReader([]byte("x"))); err != nil {
			t.Fatal(err)
		}
		for p, mode := range map[string]os.FileMode{"a/b/c": want[0], "a/b": want[1], "a": want[1], "": want[1]} {
			if fi, err := os.Stat(filepath.Join(dir, p)); err != nil || fi.Mode().Perm() != mode {
				t.Errorf("%q: %q is %v, %v, want %v", query, p, fi.Mode(), err, mode)
			}
		}
	}
	for _, mode := range []string{"rw", "0400", "0740", "1644", "0888"} {
		if (bucket.Config{Name: "x", URL: "file:///x?mode=" + mode}).Validate() == nil {
			t.Errorf("mode %s was accepted", mode)
		}
	}
}

// TestNoSuchBucket: a bucket that does not exist is not one that lacks the object.
func TestNoSuchBucket(t *testing.T) {
	_, s := stand(t)
	none := mustOpen(t, bucket.Config{
		URL: "s3://none?region=us-east-1&use_path_style=true&endpoint=http://" + s.Addr(), AccessKey: config.NewSecret("a"), SecretKey: config.NewSecret("b"),
	})
	dir := filepath.Join(t.TempDir(), "bucket")
	unmounted := mustOpen(t, bucket.Config{URL: "file://" + dir})
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]bucket.Bucket{"s3": none, "folder": unmounted} {
		_, err := b.Stat(t.Context(), "some/key")
		if !errors.Is(err, bucket.ErrMissing) || !errors.Is(err, bucket.ErrUnavailable) || errors.Is(err, bucket.ErrNotFound) {
			t.Errorf("%s: stat says %v", name, err)
		}
	}
	if _, err := none.Open(t.Context(), "some/key", 0, -1); !errors.Is(err, bucket.ErrMissing) {
		t.Errorf("open says %v", err)
	}
	if err := none.Put(t.Context(), "some/key", bytes.NewReader([]byte("x"))); !errors.Is(err, bucket.ErrMissing) {
		t.Errorf("put says %v", err)
	}
	if err := none.List(t.Context(), "", "", func(bucket.Object) error { return nil }); !errors.Is(err, bucket.ErrMissing) {
		t.Errorf("list says %v", err)
	}
}

// TestAccessDenied: a key that the bucket refuses is told as that.
func TestAccessDenied(t *testing.T) {
	b, s := stand(t)
	s.SetDenied(true)
	_, err := b.Stat(t.Context(), "some/key")
	if !errors.Is(err, bucket.ErrDenied) || !errors.Is(err, bucket.ErrUnavailable) {
		t.Errorf("stat says %v", err)
	}
	if err := b.Put(t.Context(), "some/key", bytes.NewReader([]byte("x"))); !errors.Is(err, bucket.ErrDenied) {
		t.Errorf("put says %v", err)
	}
	s.SetDenied(false)
	if _, err := b.Stat(t.Context(), "some/key"); !errors.Is(err, bucket.ErrNotFound) {
		t.Errorf("stat says %v", err)
	}
}
