package cluster

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
)

// A commit whose answer was lost is asked for again, here or at another proxy. Only the session that brought the bytes
// is answered.
func TestCommitMayBeRepeated(t *testing.T) {
	c := New(t, 0)
	ctx, repo := t.Context(), "demo/again"
	b := noise(300_000, 51)
	d := digest.FromBytes(b)
	u, err := c.Proxy.StartUpload(ctx, repo, registry.UploadOptions{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	if u, err = c.Proxy.WriteUpload(ctx, repo, u.ID, registry.Chunk{Length: int64(len(b)), Body: bytes.NewReader(b)}); err != nil {
		t.Fatal(err)
	}
	for _, proxy := range []*registry.Client{c.Proxy, c.Proxy, c.OtherProxy} {
		desc, err := proxy.CommitUpload(ctx, repo, u.ID, d, registry.Chunk{Offset: -1})
		if err != nil || desc.Digest != d {
			t.Fatalf("commit: %+v, %v", desc, err)
		}
	}
	if _, err := c.OtherProxy.CommitUpload(ctx, repo, u.ID, d, registry.Chunk{Offset: -1, Length: int64(len(b)), Body: bytes.NewReader(b)}); err != nil {
		t.Errorf("again, with the bytes: %v", err)
	}
	wantBlob(t, c.OtherProxy, repo, b)

	if _, err := c.Proxy.CommitUpload(ctx, repo, u.ID, digest.FromString("another"), registry.Chunk{Offset: -1}); !errors.Is(err, registry.ErrBlobUploadUnknown) {
		t.Errorf("as another digest: %v", err)
	}
	// Who knows only the digest.
	mine, err := c.Proxy.StartUpload(ctx, "demo/thief", registry.UploadOptions{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := c.Proxy.CommitUpload(ctx, "demo/thief", mine.ID, d, registry.Chunk{Offset: -1}); err == nil {
			t.Error("a session without the bytes was committed")
		}
	}
	if _, err := c.Proxy.CommitUpload(ctx, "demo/thief", u.ID, d, registry.Chunk{Offset: -1}); !errors.Is(err, registry.ErrBlobUploadUnknown) {
		t.Errorf("another repository's session: %v", err)
	}
	if _, err := c.Proxy.StatBlob(ctx, "demo/thief", d); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("it became a member: %v", err)
	}
}

// A PUT that was cut is sent again as it was, to the same Location, as a load balancer does by itself: as the whole
// blob, or as its end.
func TestCutPutIsSentAgain(t *testing.T) {
	c := New(t, 0)
	ctx, repo := t.Context(), "demo/cut"
	b := noise(3<<20, 52)
	d := digest.FromBytes(b)
	for _, chunked := range []int{0, 1 << 20} {
		u, err := c.Proxy.StartUpload(ctx, repo, registry.UploadOptions{Size: -1})
		if err != nil {
			t.Fatal(err)
		}
		if chunked > 0 {
			if u, err = c.Proxy.WriteUpload(ctx, repo, u.ID, registry.Chunk{Length: int64(chunked), Body: bytes.NewReader(b[:chunked])}); err != nil {
				t.Fatal(err)
			}
		}
		whole := b[chunked:]
		for range 2 {
			cut := io.MultiReader(bytes.NewReader(whole[:1<<20+77]), iotest.ErrReader(errors.New("cut on purpose")))
			if _, err := c.Proxy.CommitUpload(ctx, repo, u.ID, d, registry.Chunk{Offset: -1, Length: int64(len(whole)), Body: cut}); err == nil {
				t.Fatal("a cut blob was taken")
			}
		}
		if _, err := c.OtherProxy.CommitUpload(ctx, repo, u.ID, d, registry.Chunk{Offset: -1, Length: int64(len(whole)), Body: bytes.NewReader(whole)}); err != nil {
			t.Errorf("after %d bytes in chunks, sent again: %v", chunked, err)
		}
	}
	wantBlob(t, c.OtherProxy, repo, b)
}

// A push goes through a restart of build-index at any of its steps; while build-index stays away it is refused before
// any byte.
func TestBuildIndexRestartsDuringAPush(t *testing.T) {
	c := New(t, 0)
	ctx, repo := t.Context(), "demo/restart"
	b := noise(100_000, 53)
	restart := func() (done chan struct{}) {
		c.BuildIndex.Stop()
		done = make(chan struct{})
		go func() {
			defer close(done)
			c.BuildIndex.Start()
		}()
		return done
	}
	done := restart()
	u, err := c.Proxy.StartUpload(ctx, repo, registry.UploadOptions{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	<-done
	done = restart()
	if _, err := c.Proxy.CommitUpload(ctx, repo, u.ID, digest.FromBytes(b), registry.Chunk{Offset: -1, Length: int64(len(b)), Body: bytes.NewReader(b)}); err != nil {
		t.Error(err)
	}
	<-done
	wantBlob(t, c.Proxy, repo, b)

	c.BuildIndex.Stop()
	for range 2 {
		if _, err := c.Proxy.StartUpload(ctx, repo, registry.UploadOptions{Size: -1}); !errors.Is(err, registry.ErrUnavailable) {
			t.Errorf("without build-index: %v", err)
		}
	}
}
