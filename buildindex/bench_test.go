package buildindex

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/layout"
)

// slow is a bucket whose every request takes a while.
type slow struct {
	bucket.Bucket
	delay time.Duration
}

func (s slow) Stat(ctx context.Context, key string) (bucket.Object, error) {
	time.Sleep(s.delay)
	return s.Bucket.Stat(ctx, key)
}

func (s slow) Open(ctx context.Context, key string, off, length int64) (io.ReadCloser, error) {
	time.Sleep(s.delay)
	return s.Bucket.Open(ctx, key, off, length)
}

func (s slow) Put(ctx context.Context, key string, r io.Reader) error {
	time.Sleep(s.delay)
	return s.Bucket.Put(ctx, key, r)
}

func (s slow) Delete(ctx context.Context, key string) error {
	time.Sleep(s.delay)
	return s.Bucket.Delete(ctx, key)
}

// List takes as long for each thousand objects, as one page of S3 has.
func (s slow) List(ctx context.Context, prefix, after string, fn func(bucket.Object) error) error {
	time.Sleep(s.delay)
	n := 0
	return s.Bucket.List(ctx, prefix, after, func(o bucket.Object) error {
		if n++; n%1000 == 0 {
			time.Sleep(s.delay)
		}
		return fn(o)
	})
}

const (
	requestTime    = 20 * time.Millisecond
	layersPerImage = 10
)

// images queues n images of ten layers each, as many pushes do. Config and layers are members.
func (r *rig) images(n int) {
	r.Helper()
	r.must(r.x.db.Update(r.Context(), func(tx names.Tx) error {
		for i := range n {
			if err := r.image(tx, i); err != nil {
				return err
			}
		}
		return nil
	}))
}

func (r *rig) image(tx names.Tx, i int) error {
	repo := fmt.Sprintf("team-%d/repo", i%20)
	var layers []digest.Digest
	for l := range layersPerImage {
		d := digest.FromString(fmt.Sprintf("image %d layer %d", i, l))
		layers = append(layers, d)
		g, err := r.x.nextGeneration()
		r.must(err)
		m := cluster.Layer{Digest: d, Size: 1000}
		if err := errors.Join(tx.PutLayer(repo, d, m.Size, g), r.x.enqueue(tx, pushed(repo, m, g))); err != nil {
			return err
		}
	}
	raw := layered(r.TB, layers...)
	p, err := parseManifest("", raw)
	r.must(err)
	rec, err := r.x.record(cluster.PutTag(repo, fmt.Sprintf("v%d", i), digest.FromBytes(raw)))
	r.must(err)
	rec.MediaType, rec.Size, rec.Bytes = p.mediaType, int64(len(raw)), raw
	return errors.Join(r.x.apply(tx, rec, p), r.x.enqueue(tx, rec))
}

// ram is a bucket in memory that lists a prefix without looking at other keys, which the library's does not.
type ram struct {
	mu   sync.Mutex
	keys []string // sorted
	data map[string][]byte
}

func (m *ram) Stat(_ context.Context, key string) (bucket.Object, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.data[key]
	if !ok {
		return bucket.Object{}, bucket.ErrNotFound
	}
	return bucket.Object{Key: key, Size: int64(len(b))}, nil
}

func (m *ram) Open(ctx context.Context, key string, _, _ int64) (io.ReadCloser, error) {
	if _, err := m.Stat(ctx, key); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return io.NopCloser(bytes.NewReader(m.data[key])), nil
}

func (m *ram) Put(_ context.Context, key string, r io.Reader) error {
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if i, there := slices.BinarySearch(m.keys, key); !there {
		m.keys = slices.Insert(m.keys, i, key)
	}
	m.data[key] = b
	return nil
}

func (m *ram) Delete(_ context.Context, key string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if i, there := slices.BinarySearch(m.keys, key); there {
		m.keys = slices.Delete(m.keys, i, i+1)
		delete(m.data, key)
	}
	return nil
}

func (m *ram) List(_ context.Context, prefix, after string, fn func(bucket.Object) error) error {
	for key := max(prefix, after); ; {
		m.mu.Lock()
		i, there := slices.BinarySearch(m.keys, key)
		if there && key == after {
			i++
		}
		if i == len(m.keys) || !strings.HasPrefix(m.keys[i], prefix) {
			m.mu.Unlock()
			return nil
		}
		key = m.keys[i]
		o := bucket.Object{Key: key, Size: int64(len(m.data[key]))}
		m.mu.Unlock()
		if err := fn(o); err != nil {
			return err
		}
		after = key
	}
}

// memory is a set of one such bucket.
func memory(b testing.TB) *bucket.Set {
	set, err := bucket.OpenAll(b.Context(), []bucket.Config{{Name: "b", URL: "mem://"}}, nil)
	if err != nil {
		b.Fatal(err)
	}
	return set.Wrap(func(string, bucket.Bucket) bucket.Bucket { return &ram{data: map[string][]byte{}} })
}

func slowly(set *bucket.Set) *bucket.Set {
	return set.Wrap(func(_ string, b bucket.Bucket) bucket.Bucket { return slow{b, requestTime} })
}

// BenchmarkOutbox writes images of ten layers to a bucket that takes 20 ms a request.
func BenchmarkOutbox(b *testing.B) {
	r := newRig(b)
	r.buckets = slowly(memory(b))
	r.start("first.db")
	r.durable(true)
	r.x.restored.Store(true)
	r.x.setHeard()
	n := max(b.N, 300)
	r.images(n)
	b.ResetTimer()
	began := time.Now()
	if left, err := r.x.drain(b.Context()); err != nil || left {
		b.Fatal(left, err)
	}
	b.ReportMetric(float64(n)/time.Since(began).Seconds(), "images/s")
}

// BenchmarkRestore fills an empty database from a bucket that takes 20 ms a request: with stamps, and with links alone,
// as another registry has written them.
func BenchmarkRestore(b *testing.B) {
	for _, stamped := range []bool{true, false} {
		b.Run(fmt.Sprintf("stamps=%v", stamped), func(b *testing.B) {
			r := newRig(b)
			set := memory(b)
			r.buckets = set
			r.start("first.db")
			r.durable(true)
			n := max(b.N, 1000)
			r.images(n)
			if left, err := r.x.drain(b.Context()); err != nil || left {
				b.Fatal(left, err)
			}
			_, real, _ := set.For("any")
			if !stamped {
				r.onlyLinks(real)
			}
			r.buckets = slowly(set)
			r.start("second.db")
			b.ResetTimer()
			began := time.Now()
			r.must(r.x.fill(b.Context()))
			b.ReportMetric(float64(n)/time.Since(began).Seconds(), "images/s")
			if _, err := r.x.db.Tag(b.Context(), "team-0/repo", "v0"); err != nil {
				b.Error(err)
			}
		})
	}
}

// onlyLinks leaves of a bucket what other registries know, and gives it the blobs that the links lead to.
func (r *rig) onlyLinks(b bucket.Bucket) {
	var gone []string
	var blobs []digest.Digest
	r.must(b.List(r.Context(), layout.RepositoriesRoot, "", func(o bucket.Object) error {
		if _, ok := layout.ParseStamp(o.Key); ok {
			gone = append(gone, o.Key)
		}
		switch kind, repo, tag, d := layout.ParseKey(o.Key); kind {
		case layout.KindTagRecord:
			gone = append(gone, layout.TagRecordKey(repo, tag))
		case layout.KindLayer:
			blobs = append(blobs, d)
		}
		return nil
	}))
	for _, key := range gone {
		r.must(b.Delete(r.Context(), key))
	}
	for _, d := range blobs {
		r.must(b.Put(r.Context(), layout.BlobKey(d), link(d)))
	}
}

// BenchmarkDeletions fills an empty database from a bucket that has nothing but the stamps of deleted images: a tag and
// a manifest each, in repositories with names of 20 bytes. It says what a deletion costs in the bucket and in SQL.
func BenchmarkDeletions(b *testing.B) {
	r := newRig(b)
	set := memory(b)
	_, real, _ := set.For("any")
	n, size := max(b.N, 20_000), 0
	for i := range n {
		repo := fmt.Sprintf("team-%03d/service-%03d", i%100, i%1000)
		for k, name := range []cluster.Name{cluster.TagName(repo, fmt.Sprintf("build-%08d", i)), cluster.ManifestName(repo, digest.FromString(fmt.Sprint(i)))} {
			s := layout.Stamp{Change: cluster.DeleteName(name).At(time.Now().UnixMicro() + int64(k))}
			body := timestamp()
			size += len(s.Key()) + body.Len()
			r.must(real.Put(b.Context(), s.Key(), body))
		}
	}
	r.buckets = slowly(set)
	r.start("second.db")
	b.ResetTimer()
	began := time.Now()
	r.must(r.x.fill(b.Context()))
	took := time.Since(began)
	r.stop()
	file, err := os.Stat(filepath.Join(r.dir, "second.db"))
	r.must(err)
	b.ReportMetric(float64(2*n)/took.Seconds(), "deletions/s")
	b.ReportMetric(float64(size)/float64(2*n), "bucket-bytes/deletion")
	b.ReportMetric(float64(file.Size())/float64(2*n), "sql-bytes/deletion")
}
