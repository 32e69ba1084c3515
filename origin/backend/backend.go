// Package backend is durable storage: one small interface over buckets (a directory, S3 and what is compatible with it), and
// the layout of keys that registries already use, so that an existing bucket stays readable and ours can be served by
// others. It knows no origin and no build-index.
package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"gocloud.dev/blob"
	"gocloud.dev/blob/fileblob"
	"gocloud.dev/blob/memblob"
	"gocloud.dev/blob/s3blob"
	"gocloud.dev/gcerrors"

	"kraken/proto/config"
)

var (
	// ErrNotFound is the bucket's clear answer that there is no such object.
	ErrNotFound = errors.New("not in the bucket")
	// ErrUnavailable is everything that is no clear answer.
	ErrUnavailable = errors.New("bucket is not reachable")
)

// Object describes what is under a key.
type Object struct {
	Key  string
	Size int64
}

// Bucket keeps objects under keys, which are paths. Safe for concurrent use.
type Bucket interface {
	Stat(ctx context.Context, key string) (Object, error)
	// Open reads length bytes from off on; -1 is to the end.
	Open(ctx context.Context, key string, off, length int64) (io.ReadCloser, error)
	// Put makes the object visible whole and durable, or not at all. It replaces an older one.
	Put(ctx context.Context, key string, r io.Reader) error
	// Delete removes the object; one that is not there is fine.
	Delete(ctx context.Context, key string) error
	// List calls fn in the order of keys, until it fails.
	List(ctx context.Context, prefix string, fn func(Object) error) error
}

// Config names a bucket and the repositories that use it.
type Config struct {
	// Name is how markers on disk call the bucket: never rename one that has blobs to be written back.
	Name string `yaml:"name"`
	// URL is file:///absolute/folder, or s3://bucket?region=…&endpoint=http://host:port&use_path_style=true; mem:// for tests.
	URL string `yaml:"url"`
	// AccessKey and SecretKey are for s3; without them the usual AWS sources are asked.
	AccessKey config.Secret `yaml:"access_key"`
	SecretKey config.Secret `yaml:"secret_key"`
	// Repositories is a regular expression for whole repository names, default all. The first bucket that matches is used.
	Repositories string `yaml:"repositories"`
}

// requestTimeout bounds the calls that move no body to speak of.
const requestTimeout = 10 * time.Second

// Open opens the bucket that cfg names. It does not ask whether it is reachable.
func Open(ctx context.Context, cfg Config) (Bucket, error) {
	u, err := url.Parse(cfg.URL)
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", cfg.Name, err)
	}
	switch u.Scheme {
	case "mem":
		return &bucket{b: memblob.OpenBucket(nil), name: cfg.Name}, nil
	case "file":
		if !filepath.IsAbs(u.Path) {
			return nil, fmt.Errorf("bucket %s: %s: want file:///absolute/folder", cfg.Name, cfg.URL)
		}
		if err := os.MkdirAll(u.Path, 0o755); err != nil {
			return nil, fmt.Errorf("bucket %s: %w", cfg.Name, err)
		}
		b, err := fileblob.OpenBucket(u.Path, &fileblob.Options{NoTempDir: true, Metadata: fileblob.MetadataDontWrite})
		if err != nil {
			return nil, fmt.Errorf("bucket %s: %w", cfg.Name, err)
		}
		return &bucket{b: b, name: cfg.Name, dir: u.Path}, nil
	case "s3":
		b, err := openS3(ctx, cfg, u)
		if err != nil {
			return nil, fmt.Errorf("bucket %s: %w", cfg.Name, err)
		}
		return &bucket{b: b, name: cfg.Name}, nil
	}
	return nil, fmt.Errorf("bucket %s: %q: want file://, s3:// or mem:// as its scheme", cfg.Name, cfg.URL)
}

func openS3(ctx context.Context, cfg Config, u *url.URL) (*blob.Bucket, error) {
	q := u.Query()
	for k := range q {
		if k != "region" && k != "endpoint" && k != "use_path_style" {
			return nil, fmt.Errorf("unknown parameter %q: want region, endpoint, use_path_style", k)
		}
	}
	o := []func(*awsconfig.LoadOptions) error{awsconfig.WithRegion(q.Get("region")), awsconfig.WithRetryMaxAttempts(1)}
	if cfg.AccessKey.Value() != "" {
		o = append(o, awsconfig.WithCredentialsProvider(credentials.NewStaticCredentialsProvider(cfg.AccessKey.Value(), cfg.SecretKey.Value(), "")))
	}
	ac, err := awsconfig.LoadDefaultConfig(ctx, o...)
	if err != nil {
		return nil, err
	}
	client := s3.NewFromConfig(ac, func(o *s3.Options) {
		if e := q.Get("endpoint"); e != "" {
			o.BaseEndpoint = aws.String(e)
		}
		o.UsePathStyle = q.Get("use_path_style") == "true"
		// Not every S3 knows the checksums that the SDK adds by default.
		o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
		o.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
	})
	return s3blob.OpenBucket(ctx, client, u.Host, &s3blob.Options{RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired})
}

// bucket is a gocloud bucket; with dir it is a folder, whose writes are synced.
type bucket struct {
	b    *blob.Bucket
	name string
	dir  string

	mu     sync.Mutex
	synced map[string]bool // folders whose names are durable; nobody removes a bucket's folders while it is used
}

// maxSynced bounds the memory of a bucket's folders; what is forgotten is only synced once more.
const maxSynced = 1 << 14

func (b *bucket) fail(what, key string, err error) error {
	if gcerrors.Code(err) == gcerrors.NotFound {
		return fmt.Errorf("%s %s in bucket %s: %w", what, key, b.name, ErrNotFound)
	}
	return fmt.Errorf("%s %s in bucket %s: %w: %w", what, key, b.name, ErrUnavailable, err)
}

func (b *bucket) Stat(ctx context.Context, key string) (Object, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	a, err := b.b.Attributes(ctx, key)
	if err != nil {
		return Object{}, b.fail("stat", key, err)
	}
	return Object{key, a.Size}, nil
}

func (b *bucket) Open(ctx context.Context, key string, off, length int64) (io.ReadCloser, error) {
	r, err := b.b.NewRangeReader(ctx, key, off, length, nil)
	if err != nil {
		return nil, b.fail("read", key, err)
	}
	return r, nil
}

func (b *bucket) Put(ctx context.Context, key string, r io.Reader) error {
	// Cancelling the context is how gocloud drops what was written so far.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := b.b.NewWriter(ctx, key, &blob.WriterOptions{ContentType: "application/octet-stream"})
	if err != nil {
		return b.fail("write", key, err)
	}
	if _, err := io.Copy(w, r); err != nil {
		cancel()
		w.Close() // reports the cancellation
		return b.fail("write", key, err)
	}
	if err := w.Close(); err != nil {
		return b.fail("write", key, err)
	}
	if b.dir != "" {
		if err := b.sync(key); err != nil {
			return b.fail("sync", key, err)
		}
	}
	return nil
}

// sync makes a file and the names of all folders down to it durable: fileblob renames without a sync. A folder that was seen to be durable is
// not synced again for its own name.
func (b *bucket) sync(key string) error {
	p := filepath.Join(b.dir, filepath.FromSlash(key))
	if err := syncFile(p); err != nil {
		return err
	}
	var fresh []string
	for p != b.dir {
		p = filepath.Dir(p)
		if err := syncFile(p); err != nil {
			return err
		}
		b.mu.Lock()
		known := b.synced[p]
		b.mu.Unlock()
		if known {
			break
		}
		fresh = append(fresh, p)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.synced == nil || len(b.synced)+len(fresh) > maxSynced {
		b.synced = map[string]bool{}
	}
	for _, p := range fresh {
		b.synced[p] = true
	}
	return nil
}

func syncFile(p string) error {
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (b *bucket) Delete(ctx context.Context, key string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err := b.b.Delete(ctx, key); err != nil && gcerrors.Code(err) != gcerrors.NotFound {
		return b.fail("delete", key, err)
	}
	return nil
}

func (b *bucket) List(ctx context.Context, prefix string, fn func(Object) error) error {
	if b.dir != "" {
		if _, err := os.Stat(b.dir); err != nil { // a folder that is not mounted is not an empty one
			return b.fail("list", prefix, fmt.Errorf("%s: %w", b.dir, errUnmounted))
		}
		return b.walk(ctx, path.Dir(prefix+"x"), prefix, fn)
	}
	it := b.b.List(&blob.ListOptions{Prefix: prefix})
	for {
		o, err := it.Next(ctx)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return b.fail("list", prefix, err)
		}
		if err := fn(Object{o.Key, o.Size}); err != nil {
			return err
		}
	}
}

var errUnmounted = errors.New("the folder is not there")

// walk lists a folder in the order of keys. fileblob's own listing visits a/ before a-b/, repeats keys from page to page for that, and
// skips what it can't read.
func (b *bucket) walk(ctx context.Context, dir, prefix string, fn func(Object) error) error {
	es, err := os.ReadDir(filepath.Join(b.dir, filepath.FromSlash(dir)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // gone since it was seen, or nothing has this prefix
	}
	if err != nil {
		return b.fail("list", dir, err)
	}
	keys := make([]string, len(es))
	for i, e := range es {
		if keys[i] = path.Join(dir, e.Name()); e.IsDir() {
			keys[i] += "/"
		}
	}
	slices.Sort(keys)
	for _, key := range keys {
		if err := ctx.Err(); err != nil {
			return b.fail("list", dir, err)
		}
		sub, isDir := strings.CutSuffix(key, "/")
		switch {
		case isDir && (strings.HasPrefix(key, prefix) || strings.HasPrefix(prefix, key)):
			if err := b.walk(ctx, sub, prefix, fn); err != nil {
				return err
			}
		case !isDir && strings.HasPrefix(key, prefix):
			fi, err := os.Stat(filepath.Join(b.dir, filepath.FromSlash(key)))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return b.fail("list", key, err)
			}
			if err := fn(Object{key, fi.Size()}); err != nil {
				return err
			}
		}
	}
	return nil
}

// Set is the configured buckets.
type Set struct {
	names   []string
	match   []*regexp.Regexp
	buckets []Bucket
}

// OpenAll opens every configured bucket.
func OpenAll(ctx context.Context, cfgs []Config) (*Set, error) {
	s := &Set{}
	for _, c := range cfgs {
		if c.Name == "" {
			return nil, errors.New("buckets: each needs a name")
		}
		if _, ok := s.Get(c.Name); ok {
			return nil, fmt.Errorf("buckets: %s is there twice", c.Name)
		}
		re, err := regexp.Compile(`^(?:` + orAll(c.Repositories) + `)$`)
		if err != nil {
			return nil, fmt.Errorf("bucket %s: repositories: %w", c.Name, err)
		}
		b, err := Open(ctx, c)
		if err != nil {
			return nil, err
		}
		s.names, s.match, s.buckets = append(s.names, c.Name), append(s.match, re), append(s.buckets, b)
	}
	if len(s.names) == 0 {
		return nil, errors.New("buckets: at least one is needed")
	}
	return s, nil
}

func orAll(pattern string) string {
	if pattern == "" {
		return ".*"
	}
	return pattern
}

// For is the bucket of a repository, ok is false when none matches.
func (s *Set) For(repo string) (name string, b Bucket, ok bool) {
	for i, re := range s.match {
		if re.MatchString(repo) {
			return s.names[i], s.buckets[i], true
		}
	}
	return "", nil, false
}

// Get is a bucket by name.
func (s *Set) Get(name string) (Bucket, bool) {
	for i, n := range s.names {
		if n == name {
			return s.buckets[i], true
		}
	}
	return nil, false
}

// All calls fn for every bucket, until it fails.
func (s *Set) All(fn func(name string, b Bucket) error) error {
	for i, n := range s.names {
		if err := fn(n, s.buckets[i]); err != nil {
			return err
		}
	}
	return nil
}
