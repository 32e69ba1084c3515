package bucket

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics measures the calls of all buckets of a process.
type Metrics struct{ seconds *prometheus.HistogramVec }

// NewMetrics registers kraken_bucket_request_seconds.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "kraken_bucket_request_seconds",
		Help:    "Duration of calls to a bucket, tries included, by call and result (ok, not_found, error); open is until the first byte may come.",
		Buckets: []float64{.005, .02, .1, .5, 2, 10, 60},
	}, []string{"bucket", "call", "result"})}
	r.MustRegister(m.seconds)
	return m
}

// observed measures the calls of a bucket.
type observed struct {
	Bucket
	name string
	m    *Metrics
}

func observe(b Bucket, name string, m *Metrics) Bucket {
	if m == nil {
		return b
	}
	return &observed{b, name, m}
}

// since notes a call that began at a time and ended with err.
func (o *observed) since(began time.Time, call string, err error) {
	result := "ok"
	switch {
	case errors.Is(err, ErrNotFound):
		result = "not_found"
	case errors.Is(err, ErrUnavailable):
		result = "error"
	}
	o.m.seconds.WithLabelValues(o.name, call, result).Observe(time.Since(began).Seconds())
}

func (o *observed) Stat(ctx context.Context, key string) (obj Object, err error) {
	defer func(began time.Time) { o.since(began, "stat", err) }(time.Now())
	return o.Bucket.Stat(ctx, key)
}

func (o *observed) Open(ctx context.Context, key string, off, length int64) (r io.ReadCloser, err error) {
	defer func(began time.Time) { o.since(began, "open", err) }(time.Now())
	return o.Bucket.Open(ctx, key, off, length)
}

func (o *observed) Put(ctx context.Context, key string, r io.Reader) (err error) {
	defer func(began time.Time) { o.since(began, "put", err) }(time.Now())
	return o.Bucket.Put(ctx, key, r)
}

func (o *observed) Delete(ctx context.Context, key string) (err error) {
	defer func(began time.Time) { o.since(began, "delete", err) }(time.Now())
	return o.Bucket.Delete(ctx, key)
}

func (o *observed) List(ctx context.Context, prefix, after string, fn func(Object) error) (err error) {
	defer func(began time.Time) { o.since(began, "list", err) }(time.Now())
	return o.Bucket.List(ctx, prefix, after, fn)
}

const (
	tries      = 3
	retryPause = 50 * time.Millisecond // before the second try; four times that before the third
	// patience is how long the tries of one call may have taken for another to begin: what hangs costs its timeout
	// once.
	patience = time.Second
)

// retrying repeats a call that failed soon, for a connection that was closed or an answer like 503. A list whose first
// object was reported, and a body that can't be rewound, are not repeated.
type retrying struct{ Bucket }

func retry(b Bucket) Bucket { return retrying{b} }

// again calls f until it succeeds, is refused for good, may not be repeated, or has used up tries and patience.
func again(ctx context.Context, f func() (repeatable bool, err error)) error {
	began, pause := time.Now(), retryPause
	for n := 1; ; n++ {
		repeatable, err := f()
		var no refused
		if !repeatable || n == tries || !errors.Is(err, ErrUnavailable) || errors.As(err, &no) || ctx.Err() != nil || time.Since(began) > patience {
			return err
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
		pause *= 4
	}
}

func (r retrying) Stat(ctx context.Context, key string) (obj Object, err error) {
	err = again(ctx, func() (bool, error) {
		var err error
		obj, err = r.Bucket.Stat(ctx, key)
		return true, err
	})
	return obj, err
}

func (r retrying) Open(ctx context.Context, key string, off, length int64) (body io.ReadCloser, err error) {
	err = again(ctx, func() (bool, error) {
		var err error
		body, err = r.Bucket.Open(ctx, key, off, length)
		return true, err
	})
	return body, err
}

func (r retrying) Put(ctx context.Context, key string, body io.Reader) error {
	s, seekable := body.(io.Seeker)
	var start int64
	if seekable {
		var err error
		start, err = s.Seek(0, io.SeekCurrent)
		seekable = err == nil
	}
	first := true
	return again(ctx, func() (bool, error) {
		if !first {
			if _, err := s.Seek(start, io.SeekStart); err != nil {
				return false, err
			}
		}
		first = false
		return seekable, r.Bucket.Put(ctx, key, body)
	})
}

func (r retrying) Delete(ctx context.Context, key string) error {
	return again(ctx, func() (bool, error) { return true, r.Bucket.Delete(ctx, key) })
}

func (r retrying) List(ctx context.Context, prefix, after string, fn func(Object) error) error {
	return again(ctx, func() (bool, error) {
		reported := false
		err := r.Bucket.List(ctx, prefix, after, func(o Object) error {
			reported = true
			return fn(o)
		})
		return !reported, err
	})
}
