package chaos

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/registry"
)

const (
	tryTimeout  = 100 * time.Second // of one try; longer than any hop's patience, so that the cluster decides
	giveUp      = 3 * time.Minute   // tries of one operation end then
	retryPause  = 300 * time.Millisecond
	tagsEach    = 8 // tags of a repository: pushes overwrite
	bigBlob     = 4 << 20
	usualBlob   = 48 << 10
	thinkAtMost = 150 * time.Millisecond
)

// load is the clients. Each writer has a repository of its own; readers read everywhere.
type load struct {
	m      *model
	seed   uint64
	proxy  *registry.Client
	agents []*registry.Client
	note   func(what string, took time.Duration, err error) // of each first try
	wg     sync.WaitGroup
	gate   sync.RWMutex // held for writing, no change begins; held for reading during each
}

// start begins n readers and a writer for each repository; they end with ctx.
func (l *load) start(ctx context.Context, readers int) {
	for i, r := range l.m.repos {
		l.wg.Go(func() { l.write(ctx, r, rand.New(rand.NewPCG(l.seed, uint64(i)))) })
	}
	for i := range readers {
		l.wg.Go(func() { l.read(ctx, rand.New(rand.NewPCG(l.seed, uint64(1000+i)))) })
	}
}

// wait waits until all clients have ended.
func (l *load) wait() { l.wg.Wait() }

// do tries f until it is answered for good: success, or what trying again can't change. The first try is noted.
func (l *load) do(ctx context.Context, what string, f func(context.Context) error) error {
	end := time.Now().Add(giveUp)
	for n := 0; ; n++ {
		try, cancel := context.WithTimeout(ctx, tryTimeout)
		began := time.Now()
		err := f(try)
		cancel()
		if ctx.Err() != nil {
			return errors.Join(ctx.Err(), err)
		}
		if n == 0 {
			l.note(what, time.Since(began), passing(err))
		}
		if passing(err) == nil || time.Now().After(end) {
			return err
		}
		if sleep(ctx, retryPause) != nil {
			return errors.Join(ctx.Err(), err)
		}
	}
}

// passing returns err if trying again may help: nil for success and for what is a definite answer.
func passing(err error) error {
	if err == nil || isUnknown(err) || errors.Is(err, errWrong) {
		return nil
	}
	return err
}

func isUnknown(err error) bool {
	return errors.Is(err, registry.ErrManifestUnknown) || errors.Is(err, registry.ErrBlobUnknown) || errors.Is(err, registry.ErrNameUnknown)
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// write changes one repository until ctx ends.
func (l *load) write(ctx context.Context, r *repository, rng *rand.Rand) {
	for n := 0; sleep(ctx, time.Duration(rng.Int64N(int64(thinkAtMost)))) == nil; n++ {
		name := fmt.Sprintf("t%d", rng.IntN(tagsEach))
		l.gate.RLock()
		r.mu.Lock()
		switch k := rng.IntN(100); {
		case k < 70:
			l.push(ctx, r, rng, name)
		case k < 80:
			if i := r.pick(rng, present); i != nil {
				l.setTag(ctx, r, i, name)
			}
		case k < 83: // what was deleted is pushed again; its blobs are still there
			if i := r.pick(rng, deleted); i != nil {
				l.setTag(ctx, r, i, name)
			}
		case k < 91:
			l.deleteTag(ctx, r, name)
		default:
			if i := r.pick(rng, present); i != nil {
				l.deleteImage(ctx, r, i)
			}
		}
		r.mu.Unlock()
		l.gate.RUnlock()
	}
}

// push pushes a new image, some of whose layers are another repository's or an older image's.
func (l *load) push(ctx context.Context, r *repository, rng *rand.Rand, name string) {
	img := &image{}
	var layers []v1.Descriptor
	for range 1 + rng.IntN(3) {
		size := 1 + rng.IntN(usualBlob)
		if rng.IntN(12) == 0 {
			size = bigBlob/2 + rng.IntN(bigBlob/2)
		}
		b := content(rng, size)
		d := digest.FromBytes(b)
		if err := l.do(ctx, "push blob", func(ctx context.Context) error { return upload(ctx, l.proxy, r.name, d, b) }); err != nil {
			l.refused(ctx, "push of blob %s to %s: %v", d, r.name, err)
			return
		}
		img.blobs = append(img.blobs, blobRef{d, int64(size)})
		layers = append(layers, v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: d, Size: int64(size)})
	}
	if old := r.pick(rng, present); old != nil && rng.IntN(3) == 0 {
		b := old.blobs[0]
		img.blobs = append(img.blobs, b)
		layers = append(layers, v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: b.digest, Size: b.size})
	}
	raw, err := json.Marshal(v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Config: layers[0], Layers: layers})
	if err != nil {
		l.m.violation("marshal: %v", err)
		return
	}
	img.manifest, img.digest = raw, digest.FromBytes(raw)
	r.images[img.digest] = img
	l.setTag(ctx, r, img, name)
}

func (l *load) setTag(ctx context.Context, r *repository, img *image, name string) {
	t := r.begin(name, img.digest)
	err := l.do(ctx, "push manifest", func(ctx context.Context) error {
		_, err := l.proxy.PutManifest(ctx, r.name, registry.Reference{Tag: name}, v1.MediaTypeImageManifest, img.manifest, registry.PutOptions{})
		return err
	})
	if err != nil {
		l.refused(ctx, "push of manifest %s as %s:%s: %v", img.digest, r.name, name, err)
		return
	}
	t.is(img.digest)
	img.state = present
}

func (l *load) deleteTag(ctx context.Context, r *repository, name string) {
	t := r.tags[name]
	if t == nil {
		return
	}
	r.begin(name, gone)
	was := slices.Contains(t.may, gone) && len(t.may) == 1
	err := l.do(ctx, "delete tag", func(ctx context.Context) error {
		return l.proxy.DeleteManifest(ctx, r.name, registry.Reference{Tag: name})
	})
	switch {
	case err == nil && was:
		l.m.violation("deletion of %s:%s, which was deleted, was answered with success", r.name, name)
	case err == nil || isUnknown(err): // unknown: an earlier try may have done it
		t.is(gone)
	}
}

func (l *load) deleteImage(ctx context.Context, r *repository, img *image) {
	for name, t := range r.tags {
		if slices.Contains(t.may, img.digest) {
			r.begin(name, gone)
		}
	}
	img.state = unknown
	err := l.do(ctx, "delete manifest", func(ctx context.Context) error {
		return l.proxy.DeleteManifest(ctx, r.name, registry.Reference{Digest: img.digest})
	})
	if err != nil && !isUnknown(err) {
		return
	}
	img.state = deleted
	for _, t := range r.tags {
		if i := slices.Index(t.may, img.digest); i >= 0 {
			t.may = slices.Delete(t.may, i, i+1)
		}
	}
}

// refused is an error that trying again did not help against: what was pushed must be taken at some time.
func (l *load) refused(ctx context.Context, format string, args ...any) {
	if ctx.Err() == nil {
		l.m.violation(format, args...)
	}
}

// read pulls tags through agents and the proxy until ctx ends.
func (l *load) read(ctx context.Context, rng *rand.Rand) {
	for sleep(ctx, time.Duration(rng.Int64N(int64(thinkAtMost)))) == nil {
		r := l.m.repos[rng.IntN(len(l.m.repos))]
		from, by := l.proxy, "proxy"
		if k := rng.IntN(len(l.agents) + 1); k > 0 {
			from, by = l.agents[k-1], "agent"
		}
		r.mu.RLock()
		if name := r.pickTag(rng); name != "" {
			l.pull(ctx, from, by, r, name)
		}
		r.mu.RUnlock()
	}
}

// pull reads a tag's manifest and its blobs, and compares them with the model. The caller holds r.mu for reading.
func (l *load) pull(ctx context.Context, from *registry.Client, by string, r *repository, name string) {
	t := r.tags[name]
	var m *registry.Manifest
	err := l.do(ctx, "read tag by "+by, func(ctx context.Context) (err error) {
		m, err = from.GetManifest(ctx, r.name, registry.Reference{Tag: name}, registry.GetOptions{})
		return err
	})
	got := gone
	switch {
	case err == nil:
		got = m.Digest
	case !isUnknown(err):
		l.refused(ctx, "read of %s:%s by %s: %v", r.name, name, by, err)
		return
	}
	stale := err == nil && m.Warning != "" && t.past[got]
	if !slices.Contains(t.may, got) && !stale {
		l.m.violation("%s:%s is %q by %s, and may be %q only", r.name, name, got, by, t.may)
		return
	}
	img := r.images[got]
	if got == gone || img == nil || img.state != present {
		return
	}
	for _, b := range img.blobs {
		err := l.do(ctx, "read blob by "+by, func(ctx context.Context) error { return verify(ctx, from, r.name, b) })
		if err != nil {
			l.refused(ctx, "blob %s of %s:%s by %s: %v", b.digest, r.name, name, by, err)
		}
	}
}

// errWrong is bytes that are not what was asked for, in an answer that ended as a good one does.
var errWrong = errors.New("wrong bytes with a clean end")

func verify(ctx context.Context, from *registry.Client, repo string, b blobRef) error {
	c, err := from.OpenBlob(ctx, repo, b.digest, registry.Whole)
	if err != nil {
		return err
	}
	h := sha256.New()
	n, err := io.Copy(h, c.Body)
	if err := errors.Join(err, c.Close()); err != nil {
		return err
	}
	if got := digest.NewDigest(digest.SHA256, h); got != b.digest || n != b.size {
		return fmt.Errorf("%w: %d bytes, %s", errWrong, n, got)
	}
	return nil
}

// upload pushes one blob as docker does: a session, one chunk of unknown length, a commit.
func upload(ctx context.Context, to *registry.Client, repo string, d digest.Digest, b []byte) error {
	u, err := to.StartUpload(ctx, repo, registry.UploadOptions{Size: -1})
	if err != nil {
		return err
	}
	if u, err = to.WriteUpload(ctx, repo, u.ID, registry.Chunk{Offset: -1, Length: -1, Body: bytes.NewReader(b)}); err != nil {
		return err
	}
	_, err = to.CommitUpload(ctx, repo, u.ID, d, registry.Chunk{Offset: -1})
	return err
}

func content(rng *rand.Rand, size int) []byte {
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(rng.Uint32())
	}
	b := make([]byte, size)
	_, _ = rand.NewChaCha8(seed).Read(b) // never fails
	return b
}

// checkAll compares every tag, manifest and blob with the model, through the proxy, and returns how many were right.
func (l *load) checkAll(ctx context.Context, when string) (right int) {
	for _, r := range l.m.repos {
		r.mu.Lock()
		for name, t := range r.tags {
			right += l.checkTag(ctx, when, r, name, t)
		}
		for _, img := range r.images {
			right += l.checkImage(ctx, when, r, img)
		}
		r.mu.Unlock()
	}
	return right
}

// checkTag returns 1 if the tag is what it may be. Once it was looked at it may be nothing else.
func (l *load) checkTag(ctx context.Context, when string, r *repository, name string, t *tag) int {
	got := gone
	err := l.do(ctx, "check", func(ctx context.Context) error {
		m, err := l.proxy.GetManifest(ctx, r.name, registry.Reference{Tag: name}, registry.GetOptions{})
		if err == nil {
			got = m.Digest
		}
		return err
	})
	if err != nil && !isUnknown(err) || !slices.Contains(t.may, got) {
		l.m.violation("%s: %s:%s is %q, and may be %q only: %v", when, r.name, name, got, t.may, err)
		return 0
	}
	t.is(got)
	return 1
}

// checkImage returns how many of a manifest and its blobs are as they must be.
func (l *load) checkImage(ctx context.Context, when string, r *repository, img *image) (right int) {
	err := l.do(ctx, "check", func(ctx context.Context) error {
		_, err := l.proxy.GetManifest(ctx, r.name, registry.Reference{Digest: img.digest}, registry.GetOptions{})
		return err
	})
	switch {
	case img.state == deleted && isUnknown(err):
		return 1
	case img.state == deleted:
		l.m.violation("%s: manifest %s of %s was deleted, and is there: %v", when, img.digest, r.name, err)
		return 0
	case img.state == unknown && (err == nil || isUnknown(err)):
		return 0
	case err != nil:
		l.m.violation("%s: manifest %s of %s: %v", when, img.digest, r.name, err)
		return 0
	}
	right = 1
	for _, b := range img.blobs {
		if err := l.do(ctx, "check", func(ctx context.Context) error { return verify(ctx, l.proxy, r.name, b) }); err != nil {
			l.m.violation("%s: blob %s of manifest %s in %s: %v", when, b.digest, img.digest, r.name, err)
			continue
		}
		right++
	}
	return right
}
