package bucket

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// moody is a bucket whose Stat says what it is told to, and counts.
type moody struct {
	Bucket
	err    atomic.Pointer[error]
	probes atomic.Int64
}

func (b *moody) Stat(context.Context, string) (Object, error) {
	b.probes.Add(1)
	if err := b.err.Load(); err != nil {
		return Object{}, *err
	}
	return Object{}, ErrNotFound
}

func (b *moody) set(err error) { b.err.Store(&err) }

// TestMonitor: whatever fails how often, a bucket that is down costs a probe now and then, and the log has a line for
// each change.
func TestMonitor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var text bytes.Buffer
		b, back := &moody{}, 0
		m := NewMonitor(&Set{names: []string{"b"}, buckets: []Bucket{b}}, "probe", slog.New(slog.NewTextHandler(&text, nil)),
			func() int { return 300 }, func() { back++ })
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- m.Run(ctx) }()
		synctest.Wait()
		if s := m.States()[0]; s.Condition != Ready || s.Err != nil {
			t.Errorf("at the start it is %+v", s)
		}
		down := fmt.Errorf("%w: refused", ErrUnavailable)
		b.set(down)
		if m.Failed(ctx, "b", errors.New("of the blob")) {
			t.Error("what is not the bucket's is blamed on it")
		}
		before := b.probes.Load()
		for range 300 {
			if !m.Failed(ctx, "b", down) || m.Up("b") {
				t.Fatal("it is not down")
			}
		}
		time.Sleep(time.Minute)
		if n := b.probes.Load() - before; n < 3 || n > 15 {
			t.Errorf("%d probes in a minute", n)
		}
		for _, err := range []error{fmt.Errorf("%w: %w", ErrUnavailable, ErrMissing), fmt.Errorf("%w: %w", ErrUnavailable, ErrDenied)} {
			b.set(err)
			time.Sleep(2 * probeMax)
			if s := m.States()[0]; s.Condition != ConditionOf(err) || !errors.Is(s.Err, err) || m.Up("b") {
				t.Errorf("%v: it is %+v", err, s)
			}
		}
		b.err.Store(nil)
		time.Sleep(2 * probeMax)
		if !m.Up("b") || back != 1 {
			t.Errorf("it is up: %t, told %d times", m.Up("b"), back)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		lines := strings.Split(strings.TrimSpace(text.String()), "\n")
		want := []string{"is down", "does not exist", "denies access", "is back"}
		if len(lines) != len(want) {
			t.Fatalf("%d lines in the log:\n%s", len(lines), &text)
		}
		for i, l := range lines {
			if !strings.Contains(l, want[i]) || !strings.Contains(l, "owed=300") {
				t.Errorf("line %d is %s, want %q", i, l, want[i])
			}
		}
	})
}
