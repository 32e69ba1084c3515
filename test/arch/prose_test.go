package arch

import (
	"bufio"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"
)

// columns is the widest that a comment line may be, where a tab is four columns: what two windows side by side show.
const columns = 120

// TestCommentWidth refuses comment lines that are wider than columns. Code may be wider where breaking it reads worse.
func TestCommentWidth(t *testing.T) {
	goFiles(t, func(name string) {
		f, err := os.Open(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, 1<<20)
		for n := 1; lines.Scan(); n++ {
			line := lines.Text()
			text := strings.TrimSpace(line)
			if !strings.HasPrefix(text, "//") || strings.HasPrefix(text, "//go:") {
				continue
			}
			if w := utf8.RuneCountInString(strings.ReplaceAll(line, "\t", "    ")); w > columns {
				t.Errorf("%s:%d: a comment line of %d columns, at most %d", name, n, w, columns)
			}
		}
		if err := lines.Err(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	})
}

// goFiles calls f with each of the project's Go files, by its path from the root.
func goFiles(t *testing.T, f func(name string)) {
	t.Helper()
	projectFiles(t, ".go", 50, nil, f)
}
