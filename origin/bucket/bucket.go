// Package bucket is durable storage: one small interface over buckets (a directory, S3 and what is compatible with it,
// memory for tests). It knows no origin, no build-index, and not what keys mean: that is proto/layout. What every
// driver must do is the suite in buckettest.
package bucket

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"regexp"
	"time"

	"github.com/opencontainers/go-digest"
	"gocloud.dev/blob/memblob"

	"kraken/proto/config"
)

var (
	// ErrNotFound is the bucket's clear answer that there is no such object.
	ErrNotFound = errors.New("not in the bucket")
	// ErrUnavailable is everything that is no clear answer.
	ErrUnavailable = errors.New("bucket is not reachable")
	// ErrMissing is an ErrUnavailable: there is no such bucket. It is never ErrNotFound, which is said of objects.
	ErrMissing = errors.New("the bucket does not exist")
	// ErrDenied is an ErrUnavailable: the bucket refuses the configured key.
	ErrDenied = errors.New("access denied")
)

// Object describes what is under a key.
type Object struct {
	Key  string
	Size int64
	// Digest is what the bytes were when they were written, hashed on their way: who wrote them had a Checked body, and
	// the bucket can keep that beside the object. Empty when it is not known; List does not tell it.
	Digest digest.Digest
}

// Bucket keeps objects under keys, which are paths. Safe for concurrent use.
type Bucket interface {
	Stat(ctx context.Context, key string) (Object, error)
	// Open reads length bytes from off on; -1 is to the end.
	Open(ctx context.Context, key string, off, length int64) (io.ReadCloser, error)
	// Put makes the object visible whole and durable, or not at all. It replaces an older one. Of a Checked body with
	// other content nothing is written: ErrContent.
	Put(ctx context.Context, key string, r io.Reader) error
	// Delete removes the object; one that is not there is fine.
	Delete(ctx context.Context, key string) error
	// List calls fn for the objects whose key has the prefix and is greater than after, in the order of keys, until it
	// fails. So a listing that was cut goes on after the last key that fn has seen.
	List(ctx context.Context, prefix, after string, fn func(Object) error) error
}

// Config names a bucket and the repositories that use it.
type Config struct {
	// Name is how markers on disk call the bucket: never rename one that has blobs to be written back.
	Name string `yaml:"name"`
	// URL is file:///absolute/folder, with ?mode=0640 where others may read its files (default 0600), or
	// s3://bucket?region=…&endpoint=http://host:port&use_path_style=true; mem:// for tests. With &checksum=sha256 S3
	// checks what it is sent by x-amz-checksum-sha256; that is so without endpoint, too, and checksum=none turns it
	// off.
	URL string `yaml:"url"`
	// AccessKey and SecretKey are for s3; without them the usual AWS sources are asked.
	AccessKey config.Secret `yaml:"access_key"`
	SecretKey config.Secret `yaml:"secret_key"`
	// Repositories is a regular expression for whole repository names, default all. The first bucket that matches is
	// used.
	Repositories string `yaml:"repositories"`
	// Driver is used in the place of what URL names. Set by tests.
	Driver Bucket `yaml:"-"`
}

// Folder returns the folder of a file:// bucket, empty for one of another kind.
func (c Config) Folder() string {
	if u, err := url.Parse(c.URL); err == nil && u.Scheme == "file" {
		return u.Path
	}
	return ""
}

// Validate refuses what Open and OpenAll would refuse. It makes nothing and touches no network.
func (c Config) Validate() error {
	var m config.Mistakes
	m.Need("name", c.Name)
	m.Pattern("repositories", c.Repositories)
	if (c.AccessKey.Value() == "") != (c.SecretKey.Value() == "") {
		m.Add("access_key", "access_key and secret_key are needed together, or neither")
	}
	const want = "want file:///absolute/folder or s3://bucket?region=…"
	u, err := url.Parse(c.URL)
	switch {
	case c.URL == "":
		m.Add("url", "is needed: "+want)
	case err != nil:
		m.Add("url", "%w: "+want, err)
	case u.Scheme == "mem":
	case u.Scheme == "file" && u.Host != "":
		m.Add("url", "%q: want file:///absolute/folder, with three slashes", c.URL)
	case u.Scheme == "file":
		m.Join("url", checkFile(u))
	case u.Scheme == "s3":
		m.Join("url", checkS3(u))
	case u.Scheme == "":
		m.Add("url", "%q has no scheme: "+want, c.URL)
	default:
		m.Add("url", "%q has the scheme %s: "+want, c.URL, u.Scheme)
	}
	return m.Err()
}

// pattern matches the whole names of the repositories that use the bucket. c is valid.
func (c Config) pattern() *regexp.Regexp {
	var m config.Mistakes
	return m.Pattern("repositories", cmp.Or(c.Repositories, ".*"))
}

// requestTimeout bounds the calls that move no body to speak of.
const requestTimeout = 10 * time.Second

// Open opens the bucket that cfg names and stacks on its driver what all drivers have in common: a call that failed at
// once is tried again, and m measures what the caller waited for in all. A nil m measures nothing. It does not ask
// whether the bucket is reachable.
func Open(ctx context.Context, cfg Config, m *Metrics) (Bucket, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	d, err := driver(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", cfg.Name, err)
	}
	return observe(retry(d), cfg.Name, m), nil
}

// driver opens what a valid configuration names.
func driver(ctx context.Context, cfg Config) (Bucket, error) {
	if cfg.Driver != nil {
		return cfg.Driver, nil
	}
	u, err := url.Parse(cfg.URL)
	if err != nil {
		return nil, err
	}
	switch u.Scheme {
	case "file":
		return openFile(cfg.Name, u)
	case "s3":
		return openS3(ctx, cfg, u)
	default:
		return &cloud{b: memblob.OpenBucket(nil), name: cfg.Name}, nil
	}
}
