package role

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	"kraken/proto/config"
)

func TestLogger(t *testing.T) {
	for _, tc := range []struct {
		cfg  LogConfig
		want []string // messages that get through, of one on each level
	}{
		{LogConfig{}, []string{"info", "warn", "error"}},
		{LogConfig{Format: "json"}, []string{"info", "warn", "error"}},
		{LogConfig{Format: "json", Level: "debug"}, []string{"debug", "info", "warn", "error"}},
		{LogConfig{Format: "text", Level: "warn"}, []string{"warn", "error"}},
		{LogConfig{Level: "error"}, []string{"error"}},
	} {
		var b bytes.Buffer
		l, err := NewLogger(&b, tc.cfg)
		if err != nil {
			t.Fatal(err)
		}
		secret := config.NewSecret("hunter2")
		for _, level := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError} {
			l.Log(t.Context(), level, "m-"+strings.ToLower(level.String()), "key", secret)
		}
		lines := strings.Split(strings.TrimSpace(b.String()), "\n")
		if len(lines) != len(tc.want) {
			t.Errorf("%+v: %d lines, want %v", tc.cfg, len(lines), tc.want)
			continue
		}
		for i, line := range lines {
			if !strings.Contains(line, "m-"+tc.want[i]) || strings.Contains(line, "hunter2") || !strings.Contains(line, "[redacted]") {
				t.Errorf("%+v: line %d is %s", tc.cfg, i, line)
			}
			if json.Valid([]byte(line)) != (tc.cfg.Format == "json") {
				t.Errorf("%+v: wrong format: %s", tc.cfg, line)
			}
		}
	}
	for _, cfg := range []LogConfig{{Format: "xml"}, {Level: "loud"}} {
		if _, err := NewLogger(&bytes.Buffer{}, cfg); err == nil {
			t.Errorf("%+v: accepted", cfg)
		}
	}
}

// TestGroupEndsInReverse: each part is told only after the one added later is done.
func TestGroupEndsInReverse(t *testing.T) {
	var (
		mu    sync.Mutex
		ended []int
		g     Group
		up    sync.WaitGroup
	)
	for i := range 4 {
		up.Add(1)
		g.Add(fmt.Sprint("part ", i), func(ctx context.Context) error {
			up.Done()
			<-ctx.Done()
			mu.Lock()
			defer mu.Unlock()
			ended = append(ended, i)
			return ctx.Err()
		})
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	up.Wait()
	stop()
	if err := <-done; err != nil {
		t.Errorf("an end that was asked for is no error: %v", err)
	}
	if !slices.Equal(ended, []int{3, 2, 1, 0}) {
		t.Errorf("ended in the order %v", ended)
	}
}

// TestGroupFailure: one failure ends all, and every error is told with the name of its part.
func TestGroupFailure(t *testing.T) {
	first, second := errors.New("first"), errors.New("second")
	var g Group
	g.Add("waits", func(ctx context.Context) error { <-ctx.Done(); return nil })
	g.Add("fails late", func(ctx context.Context) error { <-ctx.Done(); return second })
	g.Add("is just done", func(context.Context) error { return nil })
	g.Add("fails", func(context.Context) error { return first })
	err := g.Run(t.Context())
	if !errors.Is(err, first) || !errors.Is(err, second) {
		t.Fatalf("ended with %v", err)
	}
	for _, want := range []string{"fails: first", "fails late: second"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not mention %q", err, want)
		}
	}
	if strings.Contains(err.Error(), "waits") || strings.Contains(err.Error(), "just done") {
		t.Errorf("%q blames parts that ended well", err)
	}
}

// TestGroupGoesOn: a part that is done ends nothing.
func TestGroupGoesOn(t *testing.T) {
	var g Group
	over, entered := make(chan struct{}), make(chan struct{})
	g.Add("is just done", func(context.Context) error { close(over); return nil })
	g.Add("works", func(ctx context.Context) error {
		<-over
		close(entered)
		<-ctx.Done()
		return nil
	})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	<-entered
	select {
	case err := <-done:
		t.Fatalf("ended with %v", err)
	default:
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestGroupIsDone: when every part is done so is the group, whatever its context says; a group of none is done at once.
func TestGroupIsDone(t *testing.T) {
	var g Group
	if err := g.Run(context.Background()); err != nil {
		t.Errorf("a group of none ended with %v", err)
	}
	g.Add("a", func(context.Context) error { return nil })
	g.Add("b", func(context.Context) error { return context.Canceled })
	if err := g.Run(context.Background()); err != nil {
		t.Errorf("ended with %v", err)
	}
}

func TestVersion(t *testing.T) {
	if v := Version(); !strings.HasPrefix(v, version) {
		t.Errorf("version %q", v)
	}
}

func TestRegistryOfAProcess(t *testing.T) {
	families, err := NewRegistry("agent").Gather()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range families {
		names = append(names, f.GetName())
	}
	for _, want := range []string{"kraken_build_info", "go_goroutines", "process_resident_memory_bytes", "process_cpu_seconds_total"} {
		if !slices.Contains(names, want) {
			t.Errorf("no %s among %v", want, names)
		}
	}
}
