package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/deploy/devcluster"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// What a push or a pull may take while one process hangs: the first one finds that out, the next ones know. Without
// -goals the machine does other things as well, so it is given several times that, and several tries.
const (
	firstGoal = 6 * time.Second
	nextGoal  = 2 * time.Second
	busyTimes = 4
	busyTries = 3
)

// TestHungProcess: while any one origin, the tracker or the bucket hangs, also one that is found out in mid-upload,
// every push and every pull succeeds, and soon.
func TestHungProcess(t *testing.T) {
	if testing.Short() {
		t.Skip("a minute")
	}
	dir := t.TempDir()
	bin := filepath.Join(dir, "bin")
	if err := devcluster.Build(t.Context(), bin); err != nil {
		t.Fatal(err)
	}
	if err := loopback(t.Context()); err != nil {
		t.Fatal(err)
	}
	r, err := open(t.Context(), filepath.Join(dir, "cluster"), bin, false)
	if r != nil {
		t.Cleanup(func() {
			if err := r.close(); err != nil {
				t.Error(err)
			}
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	l, err := clients(r, Options{Writers: 1})
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	var hung []*devcluster.Component
	for _, role := range []string{"origin", "tracker", "testfs"} {
		hung = append(hung, r.plan.Role(role)...)
	}
	for _, c := range hung {
		t.Run(c.ID(), func(t *testing.T) {
			old := newImage(t, rng) // is there before, and at no agent
			if _, err := pushImage(t.Context(), l.proxy, "hung/"+c.ID(), "old", old, nil); err != nil {
				t.Fatal(err)
			}
			stop := func() { kill(t, c, syscall.SIGSTOP) }
			defer kill(t, c, syscall.SIGCONT)
			var next [busyTries]imageBytes
			for i := range next {
				next[i] = newImage(t, rng)
				if _, err := pushImage(t.Context(), l.proxy, "hung/"+c.ID(), fmt.Sprintf("next%d", i), next[i], nil); err != nil {
					t.Fatal(err)
				}
			}
			var evicted []imageBytes // the bucket alone has them
			if c.Role != "testfs" {
				for i := range len(l.agents) + 1 {
					img := newImage(t, rng)
					if _, err := pushImage(t.Context(), l.proxy, "hung/"+c.ID(), fmt.Sprintf("evicted-%d", i), img, nil); err != nil {
						t.Fatal(err)
					}
					evict(t, r, img)
					evicted = append(evicted, img)
				}
			}
			stop()
			for i, img := range evicted {
				from := append(l.agents, l.proxy)[i]
				first(t, "pull of what only the bucket has", func() error { // each of them has to find out
					return pullImage(t.Context(), from, "hung/"+c.ID(), fmt.Sprintf("evicted-%d", i), img)
				})
			}
			for i, agent := range l.agents {
				what := fmt.Sprintf("pull by agent %d", i+1)
				first(t, what, func() error { return pullImage(t.Context(), agent, "hung/"+c.ID(), "old", old) })
				timely(t, what, func(try int) error {
					return pullImage(t.Context(), agent, "hung/"+c.ID(), fmt.Sprintf("next%d", try), next[try])
				})
			}
			kill(t, c, syscall.SIGCONT)
			if err := r.plan.Await(t.Context(), c, readyLimit); err != nil {
				t.Fatal(err)
			}
			var img imageBytes
			push := func(hang func()) error {
				img = newImage(t, rng)
				_, err := pushImage(t.Context(), l.proxy, "hung/"+c.ID(), "new", img, hang)
				return err
			}
			first(t, "push", func() error { return push(stop) })
			for range 2 {
				timely(t, "push", func(int) error { return push(nil) }) // it hangs already
			}
			timely(t, "pull of what was pushed", func(int) error { return pullImage(t.Context(), l.proxy, "hung/"+c.ID(), "new", img) })
		})
	}
}

// evict waits until the bucket has an image's layers, and removes them from all origins.
func evict(t *testing.T, r *rig, img imageBytes) {
	t.Helper()
	for _, c := range r.plan.Role("origin") {
		o, err := cluster.NewOriginClient(r.plan.URL(c), http.DefaultClient)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range img.layers {
			d := digest.FromBytes(b)
			for deadline := time.Now().Add(30 * time.Second); ; {
				if err = o.DeleteBlob(t.Context(), "hung/evicted", d); err == nil || errors.Is(err, registry.ErrBlobUnknown) {
					break // it is refused while the blob is owed to the bucket
				}
				if time.Now().After(deadline) {
					t.Fatalf("layer %s stays at %s: %v", d, c.ID(), err)
				}
				if err := sleep(t.Context(), 50*time.Millisecond); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

// first runs the first request beside a process that hangs. It must succeed in time.
func first(t *testing.T, what string, f func() error) {
	t.Helper()
	limit := firstGoal
	if !*goalsFlag {
		limit *= busyTimes
	}
	if took := succeeds(t, "first "+what, f); took > limit {
		t.Errorf("first %s took %s, want at most %s", what, seconds(took), limit)
	}
}

// timely runs a further one. All tries must succeed, and one in time.
func timely(t *testing.T, what string, f func(try int) error) {
	t.Helper()
	limit, tries := nextGoal, 1
	if !*goalsFlag {
		limit, tries = 2*nextGoal, busyTries
	}
	for try := range tries {
		if succeeds(t, what, func() error { return f(try) }) <= limit {
			return
		}
	}
	t.Errorf("%s took more than %s, %d times", what, limit, tries)
}

// succeeds returns how long f took, which must succeed.
func succeeds(t *testing.T, what string, f func() error) time.Duration {
	t.Helper()
	began := time.Now()
	err := f()
	took := time.Since(began)
	if err != nil {
		t.Errorf("%s, after %s: %v", what, took, err)
	}
	t.Logf("%s: %s", what, seconds(took))
	return took
}

func kill(t *testing.T, c *devcluster.Component, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(c.PID(), s); err != nil {
		t.Fatal(err)
	}
}

// imageBytes is an image as it is pushed.
type imageBytes struct {
	layers   [][]byte
	manifest []byte
}

func newImage(t *testing.T, rng *rand.Rand) imageBytes {
	t.Helper()
	var img imageBytes
	var ds []v1.Descriptor
	for range 3 {
		b := content(rng, 1<<20)
		img.layers = append(img.layers, b)
		ds = append(ds, v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromBytes(b), Size: int64(len(b))})
	}
	m := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Config: ds[0], Layers: ds}
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	img.manifest = raw
	return img
}

// pushImage pushes an image layer by layer. hang, unless nil, is called in the middle of the second upload.
func pushImage(ctx context.Context, to *registry.Client, repo, tag string, img imageBytes, hang func()) (digest.Digest, error) {
	for i, b := range img.layers {
		d := digest.FromBytes(b)
		u, err := to.StartUpload(ctx, repo, registry.UploadOptions{Size: -1})
		if err != nil {
			return "", fmt.Errorf("layer %d: %w", i, err)
		}
		body := &pausing{b: b}
		if i == 1 {
			body.half = hang
		}
		if u, err = to.WriteUpload(ctx, repo, u.ID, registry.Chunk{Offset: -1, Length: -1, Body: body}); err != nil {
			return "", fmt.Errorf("layer %d: %w", i, err)
		}
		if _, err := to.CommitUpload(ctx, repo, u.ID, d, registry.Chunk{Offset: -1}); err != nil {
			return "", fmt.Errorf("layer %d: %w", i, err)
		}
	}
	res, err := to.PutManifest(ctx, repo, registry.Reference{Tag: tag}, v1.MediaTypeImageManifest, img.manifest, registry.PutOptions{})
	return res.Digest, err
}

// pullImage reads a tag and all layers, and compares the bytes.
func pullImage(ctx context.Context, from *registry.Client, repo, tag string, img imageBytes) error {
	m, err := from.GetManifest(ctx, repo, registry.Reference{Tag: tag}, registry.GetOptions{})
	if err != nil {
		return err
	}
	if m.Digest != digest.FromBytes(img.manifest) {
		return errors.New("the tag is another manifest")
	}
	for i, b := range img.layers {
		if err := verify(ctx, from, repo, blobRef{digest.FromBytes(b), int64(len(b))}); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
	}
	return nil
}

// pausing is a body that calls half, unless nil, in its middle.
type pausing struct {
	b    []byte
	off  int
	half func()
}

func (p *pausing) Read(b []byte) (int, error) {
	if p.off == len(p.b) {
		return 0, io.EOF
	}
	if p.off >= len(p.b)/2 && p.half != nil {
		p.half()
		p.half = nil
	}
	n := copy(b, p.b[p.off:min(len(p.b), p.off+32<<10)])
	p.off += n
	return n, nil
}
