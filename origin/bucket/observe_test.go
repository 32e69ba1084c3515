package bucket

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"gocloud.dev/blob/memblob"
)

// flaky fails the first calls, each after a time.
type flaky struct {
	Bucket
	failures int
	err      error
	after    time.Duration
	calls    int
}

func (f *flaky) fail() error {
	f.calls++
	time.Sleep(f.after)
	if f.calls <= f.failures {
		return f.err
	}
	return nil
}

func (f *flaky) Stat(ctx context.Context, key string) (Object, error) {
	if err := f.fail(); err != nil {
		return Object{}, err
	}
	return f.Bucket.Stat(ctx, key)
}

func (f *flaky) Put(ctx context.Context, key string, r io.Reader) error {
	if _, err := io.CopyN(io.Discard, r, 2); err != nil { // a try that breaks off has used some of the body
		return err
	}
	if err := f.fail(); err != nil {
		return err
	}
	if s, ok := r.(io.Seeker); ok {
		if _, err := s.Seek(-2, io.SeekCurrent); err != nil {
			return err
		}
	}
	return f.Bucket.Put(ctx, key, r)
}

func (f *flaky) List(ctx context.Context, prefix, after string, fn func(Object) error) error {
	if err := fn(Object{Key: "x"}); err != nil {
		return err
	}
	return f.fail()
}

func memory() Bucket { return &cloud{b: memblob.OpenBucket(nil), name: "test"} }

func TestTries(t *testing.T) {
	down := fmt.Errorf("stat: %w", ErrUnavailable)
	for _, tc := range []struct {
		name     string
		f        flaky
		calls    int
		notFound bool // the answer in the end
	}{
		{"once more", flaky{failures: 1, err: down}, 2, true},
		{"no more than tries", flaky{failures: 9, err: down}, tries, false},
		{"a clear answer", flaky{failures: 9, err: ErrNotFound}, 1, true},
		{"refused for good", flaky{failures: 9, err: fmt.Errorf("%w: %w", ErrUnavailable, refused{errors.New("no such key id")})}, 1, false},
		{"what hangs costs its timeout once", flaky{failures: 9, err: down, after: requestTimeout}, 1, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tc.f.Bucket = memory()
				_, err := retry(&tc.f).Stat(t.Context(), "a")
				if tc.f.calls != tc.calls || errors.Is(err, ErrNotFound) != tc.notFound {
					t.Errorf("%d calls, %v, want %d", tc.f.calls, err, tc.calls)
				}
			})
		})
	}
}

func TestPutIsTriedAgainFromItsStart(t *testing.T) {
	down := fmt.Errorf("put: %w", ErrUnavailable)
	f := &flaky{Bucket: memory(), failures: 2, err: down}
	body := bytes.NewReader([]byte("--whole"))
	if _, err := body.Seek(2, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	if err := retry(f).Put(t.Context(), "a", body); err != nil {
		t.Fatal(err)
	}
	r, err := f.Bucket.Open(t.Context(), "a", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if b, err := io.ReadAll(r); err != nil || string(b) != "whole" {
		t.Errorf("%q, %v", b, err)
	}
	f = &flaky{Bucket: memory(), failures: 1, err: down}
	if err := retry(f).Put(t.Context(), "a", io.MultiReader(strings.NewReader("whole"))); err == nil || f.calls != 1 {
		t.Errorf("a body that can't be rewound: %d calls, %v", f.calls, err)
	}
}

func TestListReportsNothingTwice(t *testing.T) {
	f := &flaky{Bucket: memory(), failures: 9, err: ErrUnavailable}
	n := 0
	if err := retry(f).List(t.Context(), "", "", func(Object) error { n++; return nil }); err == nil || n != 1 {
		t.Errorf("%d calls, %v", n, err)
	}
}

func TestCallsAreMeasured(t *testing.T) {
	reg := prometheus.NewRegistry()
	b := observe(memory(), "b", NewMetrics(reg))
	if err := b.Put(t.Context(), "a", strings.NewReader("a")); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Stat(t.Context(), "none"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if f, err := reg.Gather(); err != nil || len(f) != 1 || len(f[0].Metric) != 2 {
		t.Errorf("%v, %v, want a series of the put and one of the stat", f, err)
	}
}
