package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proxy"
)

func noise(n int, seed byte) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

func pushBlob(ctx context.Context, r *registry.Client, repo string, b []byte) error {
	u, err := r.StartUpload(ctx, repo, registry.UploadOptions{Size: -1})
	if err != nil {
		return err
	}
	half := len(b) / 2
	u, err = r.WriteUpload(ctx, repo, u.ID, registry.Chunk{Offset: 0, Length: int64(half), Body: bytes.NewReader(b[:half])})
	if err != nil {
		return err
	}
	_, err = r.CommitUpload(ctx, repo, u.ID, digest.FromBytes(b), registry.Chunk{Offset: int64(half), Length: int64(len(b) - half), Body: bytes.NewReader(b[half:])})
	return err
}

// image pushes an image of the given layers and returns its manifest.
func image(t *testing.T, r *registry.Client, repo, tag string, layers ...[]byte) (raw []byte, d digest.Digest) {
	t.Helper()
	ctx := t.Context()
	config := []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`)
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}}
	m.SchemaVersion = 2
	for _, b := range append(layers, config) {
		if err := pushBlob(ctx, r, repo, b); err != nil {
			t.Fatalf("push blob: %v", err)
		}
	}
	for _, b := range layers {
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromBytes(b), Size: int64(len(b))})
	}
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	res, err := r.PutManifest(ctx, repo, registry.Reference{Tag: tag}, m.MediaType, raw, registry.PutOptions{})
	if err != nil {
		t.Fatalf("put manifest: %v", err)
	}
	return raw, res.Digest
}

func readBlob(ctx context.Context, r *registry.Client, repo string, d digest.Digest) ([]byte, error) {
	c, err := r.OpenBlob(ctx, repo, d, registry.Whole)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return io.ReadAll(c.Body)
}

func wantBlob(t *testing.T, r *registry.Client, repo string, b []byte) {
	t.Helper()
	got, err := readBlob(t.Context(), r, repo, digest.FromBytes(b))
	if err != nil {
		t.Errorf("read blob: %v", err)
	} else if !bytes.Equal(got, b) {
		t.Errorf("blob of %d bytes came back as %d other bytes", len(b), len(got))
	}
}

func wantManifest(t *testing.T, r *registry.Client, repo, ref string, raw []byte) {
	t.Helper()
	p, err := registry.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	m, err := r.GetManifest(t.Context(), repo, p, registry.GetOptions{})
	if err != nil {
		t.Errorf("get manifest %s: %v", ref, err)
	} else if !bytes.Equal(m.Bytes, raw) || m.MediaType != v1.MediaTypeImageManifest {
		t.Errorf("manifest %s came back as %d bytes of %s", ref, len(m.Bytes), m.MediaType)
	}
}

func TestPushAndPullThroughTheSwarm(t *testing.T) {
	c := New(t, 3)
	layer := noise(20<<20, 1)
	raw, d := image(t, c.Proxy, "demo/app", "v1", layer, noise(1000, 2))
	var wg sync.WaitGroup
	for _, a := range c.Agents {
		wg.Go(func() {
			wantManifest(t, a, "demo/app", "v1", raw)
			wantManifest(t, a, "demo/app", d.String(), raw)
			wantBlob(t, a, "demo/app", layer)
			wantBlob(t, a, "demo/app", noise(1000, 2))
		})
	}
	wg.Wait()
	Eventually(t, 15*time.Second, func() error { // the tracker is told what moved
		_, b, err := get("http://" + c.Tracker.role.(interface{ Addr() string }).Addr() + "/swarms")
		if err != nil {
			return err
		}
		var page struct {
			Nodes []struct{ Downloaded int64 }
		}
		if err := json.Unmarshal(b, &page); err != nil {
			return err
		}
		var n int64
		for _, node := range page.Nodes {
			n += node.Downloaded
		}
		if n < 3*int64(len(layer)) {
			return fmt.Errorf("nodes have received %d bytes, the tracker's page says", n)
		}
		return nil
	})
	wantBlob(t, c.Proxy, "demo/app", layer)
	l, err := c.Agents[0].ListTags(t.Context(), "demo/app", registry.Page{N: -1})
	if err != nil || len(l.Names) != 1 || l.Names[0] != "v1" {
		t.Errorf("tags %v, %v", l, err)
	}
}

func TestMutualTLSEverywhere(t *testing.T) {
	c := NewMutualTLS(t, 2)
	layer := noise(8<<20, 3)
	raw, _ := image(t, c.Proxy, "demo/tls", "v1", layer)
	var wg sync.WaitGroup
	for _, a := range c.Agents {
		wg.Go(func() {
			wantManifest(t, a, "demo/tls", "v1", raw)
			wantBlob(t, a, "demo/tls", layer)
		})
	}
	wg.Wait()
	// No listener, of HTTP or of peers, serves whoever lacks a certificate of the cluster.
	for _, m := range c.Listeners {
		conn, err := net.DialTimeout("tcp", m, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		tc := tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
		_, err = tc.Read(make([]byte, 1)) // in TLS 1.3 the refusal comes after the handshake
		if !strings.Contains(fmt.Sprint(err), "certificate required") {
			t.Errorf("%s answered a stranger with %v", m, err)
		}
		conn.Close()
	}
}

func TestManyReadersOfOneBlobInFlight(t *testing.T) {
	c := New(t, 1)
	layer := noise(12<<20, 3)
	image(t, c.Proxy, "demo/app", "v1", layer)
	d := digest.FromBytes(layer)
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			off := int64(i) * 2 << 20
			body, err := c.Agents[0].OpenBlob(t.Context(), "demo/app", d, registry.Range{Offset: off, Length: -1})
			if err != nil {
				t.Error(err)
				return
			}
			defer body.Close()
			if _, err := body.Body.Seek(off, io.SeekStart); err != nil {
				t.Error(err)
			}
			// Read some and leave early, as containerd's parallel fetch does.
			got := make([]byte, 1<<20)
			if _, err := io.ReadFull(body.Body, got); err != nil || !bytes.Equal(got, layer[off:off+int64(len(got))]) {
				t.Errorf("reader at %d: wrong bytes or %v", off, err)
			}
		})
	}
	wg.Wait()
	wantBlob(t, c.Agents[0], "demo/app", layer)
}

func TestWrongDigestLeavesNothing(t *testing.T) {
	c := New(t, 0)
	ctx, repo := t.Context(), "demo/wrong"
	b := noise(300_000, 4)
	lie := digest.FromString("something else")
	u, err := c.Proxy.StartUpload(ctx, repo, registry.UploadOptions{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Proxy.CommitUpload(ctx, repo, u.ID, lie, registry.Chunk{Offset: -1, Length: int64(len(b)), Body: bytes.NewReader(b)})
	if !errors.Is(err, registry.ErrDigestInvalid) {
		t.Errorf("commit: %v, want ErrDigestInvalid", err)
	}
	for _, d := range []digest.Digest{lie, digest.FromBytes(b)} {
		if _, err := readBlob(ctx, c.Proxy, repo, d); !errors.Is(err, registry.ErrBlobUnknown) {
			t.Errorf("read %s: %v, want ErrBlobUnknown", d, err)
		}
	}
	for i := range c.Origins {
		for _, dir := range []string{"uploads", "blobs"} {
			es, err := os.ReadDir(c.StateDir(fmt.Sprintf("origin-%02d", i+1)) + "/" + dir)
			if err != nil || len(es) > 0 {
				t.Errorf("origin %d keeps %v, %v", i+1, es, err)
			}
		}
	}
}

func TestChunksOutOfOrder(t *testing.T) {
	c := New(t, 0)
	ctx, repo := t.Context(), "demo/chunks"
	b := noise(100_000, 5)
	u, err := c.Proxy.StartUpload(ctx, repo, registry.UploadOptions{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	chunk := func(from, to int) registry.Chunk {
		return registry.Chunk{Offset: int64(from), Length: int64(to - from), Body: bytes.NewReader(b[from:to])}
	}
	if u, err = c.Proxy.WriteUpload(ctx, repo, u.ID, chunk(0, 40_000)); err != nil || u.Offset != 40_000 {
		t.Fatalf("first chunk: %+v, %v", u, err)
	}
	for _, at := range []int{50_000, 10_000} {
		var re *registry.RangeError
		if _, err := c.Proxy.WriteUpload(ctx, repo, u.ID, chunk(at, at+10)); !errors.As(err, &re) || re.Upload.Offset != 40_000 {
			t.Errorf("chunk at %d: %v, want a RangeError at 40000", at, err)
		}
	}
	if s, err := c.Proxy.UploadStatus(ctx, repo, u.ID); err != nil || s.Offset != 40_000 {
		t.Errorf("status %+v, %v", s, err)
	}
	if _, err := c.Proxy.CommitUpload(ctx, repo, u.ID, digest.FromBytes(b), chunk(40_000, 100_000)); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, c.Proxy, repo, b)
	if _, err := c.Proxy.UploadStatus(ctx, repo, u.ID); !errors.Is(err, registry.ErrBlobUploadUnknown) {
		t.Errorf("status after the commit: %v", err)
	}
}

func TestOneOriginDownAtPush(t *testing.T) {
	c := New(t, 1)
	for i, o := range c.Origins {
		o.Stop()
		repo := fmt.Sprintf("demo/down%d", i)
		layer := noise(3<<20, byte(10+i))
		raw, _ := image(t, c.Proxy, repo, "v1", layer)
		wantManifest(t, c.Agents[0], repo, "v1", raw)
		wantBlob(t, c.Agents[0], repo, layer)
		o.Start()
	}
}

func TestMissingIsNotUnreachable(t *testing.T) {
	c := New(t, 1)
	d := digest.FromString("nobody has this")
	if _, err := c.Agents[0].StatBlob(t.Context(), "demo/none", d); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("no repository has it: %v, want ErrBlobUnknown", err)
	}
	if err := c.index(t).PutLayer(t.Context(), "demo/none", cluster.Layer{Digest: d, Size: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Agents[0].StatBlob(t.Context(), "demo/none", d); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("all are up: %v, want ErrBlobUnknown", err)
	}
	c.Origins[0].Stop()
	if _, err := c.Agents[0].StatBlob(t.Context(), "demo/none", d); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("an origin that may have it is down: %v, want ErrUnavailable", err)
	}
}

func TestTagsAreTrue(t *testing.T) {
	c := New(t, 2)
	ctx, repo := t.Context(), "demo/tags"
	for i := range 3 {
		raw, _ := image(t, c.Proxy, repo, "latest", noise(100, byte(20+i)))
		for _, a := range c.Agents {
			wantManifest(t, a, repo, "latest", raw)
		}
	}
	if err := c.Proxy.DeleteManifest(ctx, repo, registry.Reference{Tag: "latest"}); err != nil {
		t.Fatal(err)
	}
	for _, a := range c.Agents {
		if _, err := a.GetManifest(ctx, repo, registry.Reference{Tag: "latest"}, registry.GetOptions{}); !errors.Is(err, registry.ErrManifestUnknown) {
			t.Errorf("deleted tag: %v, want ErrManifestUnknown", err)
		}
	}
}

// A deleted manifest is gone at an agent that has it in its cache after the time that is configured.
func TestDeletedDigestGoesAtAgents(t *testing.T) {
	c := New(t, 1)
	ctx, repo := t.Context(), "demo/digests"
	raw, d := image(t, c.Proxy, repo, "v1", noise(100, 40))
	wantManifest(t, c.Agents[0], repo, d.String(), raw)
	if err := c.Proxy.DeleteManifest(ctx, repo, registry.Reference{Digest: d}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Agents[0].GetManifest(ctx, repo, registry.Reference{Tag: "v1"}, registry.GetOptions{}); !errors.Is(err, registry.ErrManifestUnknown) {
		t.Errorf("its tag: %v, want ErrManifestUnknown", err)
	}
	Eventually(t, 5*ManifestTTL, func() error {
		if _, err := c.Agents[0].GetManifest(ctx, repo, registry.Reference{Digest: d}, registry.GetOptions{}); !errors.Is(err, registry.ErrManifestUnknown) {
			return fmt.Errorf("deleted digest: %v, want ErrManifestUnknown", err)
		}
		return nil
	})
}

// An upload goes on at any proxy: these keep nothing.
func TestUploadGoesOnAtAnotherProxy(t *testing.T) {
	c := New(t, 0)
	ctx, repo := t.Context(), "demo/moves"
	b := noise(300_000, 41)
	d := digest.FromBytes(b)
	u, err := c.Proxy.StartUpload(ctx, repo, registry.UploadOptions{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	const half = 100_000
	if u, err = c.Proxy.WriteUpload(ctx, repo, u.ID, registry.Chunk{Length: half, Body: bytes.NewReader(b[:half])}); err != nil {
		t.Fatal(err)
	}
	c.ProxyPart.Stop()
	got, err := c.OtherProxy.UploadStatus(ctx, repo, u.ID)
	if err != nil || got.Offset != half {
		t.Fatalf("the other proxy sees %+v, %v", got, err)
	}
	rest := registry.Chunk{Offset: half, Length: int64(len(b) - half), Body: bytes.NewReader(b[half:])}
	if _, err := c.OtherProxy.CommitUpload(ctx, repo, got.ID, d, rest); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, c.OtherProxy, repo, b)
}

// A last chunk of unknown length that is cut is no reason to end the session: its bytes don't have the digest yet.
func TestCutLastChunkCanBeSentAgain(t *testing.T) {
	c := New(t, 0)
	ctx, repo := t.Context(), "demo/cut"
	b := noise(3<<20, 42)
	d := digest.FromBytes(b)
	u, err := c.Proxy.StartUpload(ctx, repo, registry.UploadOptions{Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	cut := io.MultiReader(bytes.NewReader(b[:2<<20]), iotest.ErrReader(errors.New("cut on purpose")))
	if _, err := c.Proxy.CommitUpload(ctx, repo, u.ID, d, registry.Chunk{Offset: -1, Length: -1, Body: cut}); err == nil {
		t.Fatal("a cut blob was taken")
	}
	for deadline := time.Now().Add(20 * time.Second); ; {
		got, err := c.Proxy.UploadStatus(ctx, repo, u.ID)
		if err != nil {
			t.Fatalf("after the cut: %v", err)
		}
		rest := registry.Chunk{Offset: got.Offset, Length: int64(len(b)) - got.Offset, Body: bytes.NewReader(b[got.Offset:])}
		if _, err = c.Proxy.CommitUpload(ctx, repo, got.ID, d, rest); err == nil {
			break
		}
		// The origins may still be busy with the end of the cut one.
		if errors.Is(err, registry.ErrBlobUploadUnknown) || errors.Is(err, registry.ErrDigestInvalid) || time.Now().After(deadline) {
			t.Fatalf("the rest from byte %d: %v", got.Offset, err)
		}
	}
	wantBlob(t, c.Proxy, repo, b)
}

// A body that is no HTTP is the client's mistake.
func TestMalformedBody(t *testing.T) {
	c := New(t, 0)
	for _, method := range []string{"PATCH", "PUT"} {
		u, err := c.Proxy.StartUpload(t.Context(), "demo/malformed", registry.UploadOptions{Size: -1})
		if err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("tcp", c.ProxyPart.role.(*proxy.Proxy).Addr())
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintf(conn, "%s /v2/demo/malformed/blobs/uploads/%s?digest=%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
			method, u.ID, digest.FromString("hello"))
		answer, err := io.ReadAll(conn)
		if err != nil || !bytes.HasPrefix(answer, []byte("HTTP/1.1 400 ")) || !bytes.Contains(answer, []byte(`"BLOB_UPLOAD_INVALID"`)) {
			t.Errorf("%s: %q, %v", method, answer, err)
		}
		conn.Close()
	}
}

func TestCompareAndSwap(t *testing.T) {
	c := New(t, 0)
	ctx, repo := t.Context(), "demo/cas"
	raw, d := image(t, c.Proxy, repo, "v1", noise(100, 30))
	put := func(have digest.Digest) error {
		_, err := c.Proxy.PutManifest(ctx, repo, registry.Reference{Tag: "v1"}, v1.MediaTypeImageManifest, raw, registry.PutOptions{IfMatch: []digest.Digest{have}})
		return err
	}
	if err := put(digest.FromString("other")); !errors.Is(err, registry.ErrPrecondition) {
		t.Errorf("wrong digest: %v, want ErrPrecondition", err)
	}
	if err := put(d); err != nil {
		t.Errorf("right digest: %v", err)
	}
}

func TestMembership(t *testing.T) {
	c := New(t, 0)
	ctx := t.Context()
	b := noise(5000, 31)
	d := digest.FromBytes(b)
	if err := pushBlob(ctx, c.Proxy, "demo/a", b); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Proxy.StatBlob(ctx, "demo/b", d); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("another repository: %v, want ErrBlobUnknown", err)
	}
	if _, err := c.Proxy.MountBlob(ctx, "demo/b", "demo/a", d); err != nil {
		t.Fatalf("mount: %v", err)
	}
	wantBlob(t, c.Proxy, "demo/b", b)
	if _, err := c.Proxy.MountBlob(ctx, "demo/c", "demo/forgot", d); err != nil {
		t.Fatalf("mount from a repository that lacks what others have: %v", err)
	}
	wantBlob(t, c.Proxy, "demo/c", b)
	if _, err := c.Proxy.MountBlob(ctx, "demo/c", "demo/a", digest.FromString("nowhere")); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("mount of what no repository has: %v, want ErrBlobUnknown", err)
	}
	if err := c.Proxy.DeleteBlob(ctx, "demo/b", d); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Proxy.StatBlob(ctx, "demo/b", d); !errors.Is(err, registry.ErrBlobUnknown) {
		t.Errorf("after delete: %v, want ErrBlobUnknown", err)
	}
	wantBlob(t, c.Proxy, "demo/a", b)
}

// writtenBack waits until nothing is left to write to the bucket.
func writtenBack(t *testing.T, c *Cluster) {
	t.Helper()
	Eventually(t, time.Minute, func() error { return c.owed("origin-01", "origin-02", "origin-03", "build-index") })
}

func TestBucketDownThenEveryDiskLost(t *testing.T) {
	c := New(t, 2)
	repo := "demo/ha"
	layer := noise(3<<20, 40)
	c.Bucket.SetDown(true)
	raw, d := image(t, c.Proxy, repo, "v1", layer)
	for _, p := range append([]*Part{c.BuildIndex}, c.Origins...) {
		p.Stop()
		p.Start()
	}
	wantManifest(t, c.Agents[0], repo, "v1", raw)
	wantBlob(t, c.Agents[0], repo, layer)

	// The index loses its disk while the bucket has nothing: the origins' records are enough.
	c.BuildIndex.Stop()
	if err := os.RemoveAll(c.StateDir("build-index")); err != nil {
		t.Fatal(err)
	}
	c.Bucket.SetDown(false)
	c.BuildIndex.Start()
	Eventually(t, 30*time.Second, func() error {
		_, err := c.Proxy.GetManifest(t.Context(), repo, registry.Reference{Tag: "v1"}, registry.GetOptions{})
		return err
	})

	writtenBack(t, c)
	for i, p := range append([]*Part{c.BuildIndex}, c.Origins...) {
		p.Stop()
		name := "build-index"
		if i > 0 {
			name = fmt.Sprintf("origin-%02d", i)
		}
		if err := os.RemoveAll(c.StateDir(name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range append(c.Origins, c.BuildIndex) {
		p.Start()
	}
	Eventually(t, 30*time.Second, func() error {
		_, err := c.Proxy.GetManifest(t.Context(), repo, registry.Reference{Tag: "v1"}, registry.GetOptions{})
		if err != nil && !errors.Is(err, registry.ErrUnavailable) {
			t.Fatalf("while names are restored: %v, want ErrUnavailable", err)
		}
		return err
	})
	wantManifest(t, c.Agents[1], repo, d.String(), raw)
	wantBlob(t, c.Agents[1], repo, layer)
	wantBlob(t, c.Proxy, repo, layer)
}

// TestDeletionOvertakesItsPush: what was deleted before it was in the bucket must not come back from there.
func TestDeletionOvertakesItsPush(t *testing.T) {
	c := New(t, 0)
	ctx, repo := t.Context(), "demo/gone"
	c.Bucket.SetDown(true)
	_, d := image(t, c.Proxy, repo, "v1", noise(100, 45))
	if err := c.Proxy.DeleteManifest(ctx, repo, registry.Reference{Digest: d}); err != nil {
		t.Fatal(err)
	}
	c.Bucket.SetDown(false)
	writtenBack(t, c)
	c.BuildIndex.Stop()
	if err := os.RemoveAll(c.StateDir("build-index")); err != nil {
		t.Fatal(err)
	}
	c.BuildIndex.Start()
	Eventually(t, 30*time.Second, func() error {
		_, err := c.Proxy.GetManifest(ctx, repo, registry.Reference{Digest: d}, registry.GetOptions{})
		if errors.Is(err, registry.ErrManifestUnknown) {
			return nil
		}
		if err == nil {
			t.Fatal("a deleted manifest came back")
		}
		return err
	})
}

func TestControlPlaneDown(t *testing.T) {
	c := New(t, 1)
	repo := "demo/down"
	big, small := noise(4<<20, 50), noise(100, 51)
	raw, d := image(t, c.Proxy, repo, "v1", big, small)
	wantManifest(t, c.Agents[0], repo, "v1", raw)
	for _, p := range []*Part{c.Tracker, c.BuildIndex, c.ProxyPart} {
		p.Stop()
	}
	m, err := c.Agents[0].GetManifest(t.Context(), repo, registry.Reference{Tag: "v1"}, registry.GetOptions{})
	if err != nil || !strings.HasPrefix(m.Warning, "110 ") {
		t.Errorf("by tag: %+v, %v, want a stale answer with a warning", m, err)
	}
	wantManifest(t, c.Agents[0], repo, d.String(), raw)
	wantBlob(t, c.Agents[0], repo, big)
	wantBlob(t, c.Agents[0], repo, small)
}

func TestAgentRestartKeepsItsCache(t *testing.T) {
	c := New(t, 1)
	layer := noise(4<<20, 60)
	image(t, c.Proxy, "demo/app", "v1", layer)
	wantBlob(t, c.Agents[0], "demo/app", layer)
	c.AgentParts[0].Stop()
	c.AgentParts[0].Start()
	for _, o := range c.Origins {
		o.Stop()
	}
	wantBlob(t, c.Agents[0], "demo/app", layer)
}
