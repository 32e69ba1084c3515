package main

import "testing"

// Whoever mistypes must neither measure everything nor overwrite a report with an empty one.
func TestChoose(t *testing.T) {
	for _, tc := range []struct {
		pattern string
		args    []string
		want    int // 0: refused
	}{
		{".", nil, len(sections)},
		{"shaped-4", nil, 1},
		{"shaped", nil, 4},
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
