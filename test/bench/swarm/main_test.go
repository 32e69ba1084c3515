package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"testing"
)

// Whoever mistypes must neither measure everything nor overwrite a report with an empty one.
func TestChoose(t *testing.T) {
	for _, tc := range []struct {
		pattern string
		args    []string
		want    int // 0: refused
	}{
		{".", nil, len(sections)},
		{"shaped-4", nil, 1},
		{"shaped", nil, 5},
		{"small|tracker", nil, 2},
		{"nosuch", nil, 0},
		{"(", nil, 0},
		{".", []string{"shaped-4"}, 0},
	} {
		got, err := choose(tc.pattern, tc.args)
		if len(got) != tc.want || (err == nil) != (tc.want > 0) {
			t.Errorf("--rows %q %q: %d sections, %v, want %d", tc.pattern, tc.args, len(got), err, tc.want)
		}
	}
}

// A cluster that can't be started says why, and leaves nothing.
func TestClusterThatDoesNotStart(t *testing.T) {
	b := &bench{bin: t.TempDir(), out: t.TempDir()}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // nothing is waited for
	c, err := b.newCluster(ctx, options{agents: 1})
	if c != nil || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v, %v, want an error about missing binaries", c, err)
	}
	if left, err := os.ReadDir(b.out); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
